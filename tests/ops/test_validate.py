"""Arguments that no caller should give, and tensors without numbers: an error of ours, or the right answer."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cvg_kernels as cvg
from cvg_kernels.ops import first_highest_keys

HOP = torch.rand(1, 3, 2, 2)
CROSS = torch.rand(1, 2, 2, 3)
GIVEN = {
    cvg.path_flow: {"cross": CROSS, "temporal": [HOP]},
    cvg.subgraph_max_flow: {"cross": CROSS, "temporal": [HOP]},
    cvg.coupled_max_flow: {"cross": CROSS, "temporal": [HOP]},
    cvg.min_max_matmul: {"a": torch.rand(1, 2, 3), "b": torch.rand(1, 3, 2)},
    cvg.token_peaks: {"flow": torch.rand(1, 2, 3, 4, 5)},
    cvg.max_flow: {"capacity": torch.rand(1, 3, 3), "source": 0, "sink": 1},
    cvg.guidance_mix: {"predictions": [torch.rand(1, 2)] * 2, "scales": [2.0]},
    cvg.depth_structure: {"depth": torch.rand(1, 1, 4, 4), "t_s": 1},
    first_highest_keys: {"query": torch.rand(1, 1, 2, 3), "key": torch.rand(1, 1, 2, 3), "scale": 1.0},
    cvg.temporal_attention: {name: torch.rand(1, 1, 2, 3) for name in ("query", "key", "value")},
}
NO_TENSORS = {
    "nothing": None,
    "word": "word",
    "number": 3.5,
    "class": object,
    "dict": {},
    "complex": torch.zeros(2, 3, dtype=torch.complex64),
    "sparse": torch.eye(3).to_sparse(),
    "eight-bits": torch.zeros(1, 2, 2, 3, dtype=torch.float8_e4m3fn),
}
TENSORS = [
    (function, name)
    for function, arguments in GIVEN.items()
    for name, value in arguments.items()
    if isinstance(value, (torch.Tensor, list)) and name != "scales"
]


@pytest.mark.drawn(6)
@pytest.mark.parametrize("junk", NO_TENSORS.values(), ids=NO_TENSORS)
@pytest.mark.parametrize("function,name", TENSORS, ids=lambda one: getattr(one, "__name__", one))
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_is_no_tensor_is_named(function, name, junk, backend):
    if name == "temporal" and junk == {}:
        pytest.skip("no hops in any sequence")
    with pytest.raises(cvg.ArgumentError):
        function(**GIVEN[function] | {name: junk}, backend=backend)


@pytest.mark.parametrize(
    "function,changed,message",
    [
        (cvg.path_flow, {"temporal": [HOP, None]}, r"temporal\[1\] must be a tensor, got None"),
        (cvg.path_flow, {"temporal": 3}, "temporal must be a sequence of tensors, got 3"),
        (cvg.path_flow, {"temperature": "cold"}, "temperature must be None or positive, got 'cold'"),
        (cvg.path_flow, {"correct_bias": "no"}, "correct_bias must be True or False, got 'no'"),
        (cvg.path_flow, {"spatial": 1.0}, "spatial must be floating point .* got 1.0"),
        (cvg.min_max_matmul, {"temperature": [1]}, "temperature must be None or positive, got list"),
        (cvg.coupled_max_flow, {"cross": [None]}, "cross must be float32 or float64 .* got list"),
        (cvg.token_peaks, {"sigma": None}, "sigma must be a number, got None"),
        (cvg.token_peaks, {"sharpness": b"100"}, "sharpness must be a number, got bytes"),
        (cvg.token_peaks, {"sharpness": float("nan")}, "sharpness must be finite, got nan"),
        (cvg.guidance_mix, {"predictions": 3.5}, "predictions must be a sequence of tensors"),
        (cvg.guidance_mix, {"scales": 7.5}, "scales must be a sequence of numbers or tensors"),
        (cvg.guidance_mix, {"rescale": None}, "rescale must be a number, got None"),
        (cvg.guidance_mix, {"predictions": [torch.rand(3)] * 2, "rescale": 0.5}, "rescale must be 0"),
        (cvg.guidance_mix, {"predictions": [torch.rand(3, 1)] * 2, "rescale": 1}, "rescale must be 0"),
        (first_highest_keys, {"scale": {}}, "scale must be a number or None"),
        (cvg.temporal_attention, {"capture": "yes"}, "capture must be True or False, got 'yes'"),
        (cvg.temporal_attention, {"row_max_grad": 1}, "row_max_grad must be True or False, got 1"),
    ],
)
def test_messages(function, changed, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        function(**GIVEN[function] | changed)


@pytest.mark.parametrize("function", [cvg.path_flow, cvg.subgraph_max_flow, cvg.coupled_max_flow])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_hops_may_be_read_only_once(function, backend):
    """An iterator's hops were once looked at in the checks, and gone when the flow was computed."""
    hops = [torch.rand(1, 3, 2, 2) for _ in range(2)]
    found = function(CROSS, iter(hops), backend=backend)
    wanted = function(CROSS, hops, backend=backend)
    for mine, right in zip(found, wanted, strict=True):
        assert torch.equal(mine, right)


def without_numbers(call):
    """Results on the meta device, and of fake tensors."""
    with FakeTensorMode() as mode:
        fake = call(lambda tensor: mode.from_tensor(tensor))
    return [call(lambda tensor: tensor.to("meta")), fake]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tensors_without_numbers(backend):
    """They have shapes: graphs cannot be checked, nor rounds per sample be read."""
    capacity, depth = torch.rand(2, 3, 3), torch.rand(2, 1, 4, 6)
    for found in without_numbers(lambda to: cvg.max_flow(to(capacity), 0, 2, backend=backend)):
        assert found.flow.shape == (2,) and found.source_side.shape == (2, 3)
    for found in without_numbers(lambda to: cvg.subgraph_max_flow(to(CROSS), [to(HOP)], backend=backend)):
        assert found.flow.shape == (1, 2, 3) and found.cut.shape == (1, 2, 3, 2, 2)
    for found in without_numbers(lambda to: cvg.depth_structure(to(depth), 2, backend=backend)):
        assert found.shape == depth.shape
    rounds = torch.tensor([1, 2])
    with pytest.raises(cvg.ArgumentError, match="t_s must be a number, or a tensor that holds numbers"):
        without_numbers(lambda to: cvg.depth_structure(to(depth), to(rounds), backend=backend))
