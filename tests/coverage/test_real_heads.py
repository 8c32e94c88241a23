"""Networks whose heads are as wide as those of released models, so that the kernels run which such models get."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels import native  # noqa: E402
from tests.coverage import gradients  # noqa: E402
from tests.coverage.row import WORDS, Row  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

#: Case → (width of its heads, what of the network's configuration is changed for it).
FAMILIES = {
    "cogvideox": (64, {"attention_head_dim": 64}),
    "latte": (96, {"attention_head_dim": 96, "cross_attention_dim": 288, "num_layers": 1}),
    "wan": (128, {"attention_head_dim": 128}),
}


@pytest.fixture(scope="module")
def row(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Row.of(request.param, **FAMILIES[request.param][1])
    torch.set_num_threads(before)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize(
    ("row", "backend"),
    [(name, "native") for name in FAMILIES] + [("cogvideox", "triton"), ("wan", "triton")],
    indirect=["row"],
)
def test_maps_and_gradients_by_the_kernels_themselves(row, backend):
    if backend == "native" and native.reason("cpu"):
        pytest.skip(f"no native module: {native.reason('cpu')}")
    width, _ = FAMILIES[row.case.name]
    assert {seen.query.shape[-1] for seen in row.watch.seen} == {width}

    with cvg.trace_backends() as ran, cvg.capture(row.pipe, WORDS, backend=backend) as captured:
        row.run()
    assert {by for operation, by in ran if operation.startswith("attention")} == {backend}
    records = [record for record in captured.records if record.branch == "cond"]
    for record, wanted in zip(records, row.wanted, strict=True):
        torch.testing.assert_close(record.maps[0].flatten(1), wanted.maps.float(), rtol=0, atol=1e-5)
    row.restored()

    weights = {layer: torch.randn(maps.shape) for layer, maps in row.seen_maps(row.watch, row.first)}
    with cvg.trace_backends() as ran:
        found = gradients.ours(row, weights, backend)
    assert {("attention", backend), ("attention_backward", backend)} <= set(ran)
    assert {by for operation, by in ran if operation.startswith("attention")} == {backend}
    assert gradients.error(row, weights, found) <= 1e-4
    row.restored()
