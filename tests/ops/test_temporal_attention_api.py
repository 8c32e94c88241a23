"""temporal_attention as torch and its user see it: registration, compilation, threads, choice of backend, messages."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import cvg_kernels as cvg
from cvg_kernels import native
from cvg_kernels._layout import dense_like
from cvg_kernels.ops import _temporal_attention_native, _temporal_attention_reference
from tests.ops.checks import CPU_BACKENDS, NATIVE, Counter
from tests.ops.levels import EVERY_LEVEL


def inputs(dtype: torch.dtype = torch.float32, *, requires_grad: bool = True, frames: int = 6):
    """Query, key and value of 5 positions and 3 heads, the heads inside the frames."""
    made = [torch.randn(5, frames, 3, dim, dtype=dtype).transpose(1, 2) for dim in (8, 8, 4)]
    return [t.requires_grad_(requires_grad) for t in made]


# --- registration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "added, capture, dtype, requires_grad, backend",
    [
        ("band", True, torch.float32, True, "auto"),
        ("none", False, torch.bfloat16, True, "auto"),
        ("bias", True, torch.float64, False, "auto"),
        ("band", True, torch.float32, True, "reference"),
    ],
    ids=["all", "bf16-plain", "fp64-no-grad", "reference"],
)
def test_opcheck_forward(added, capture, dtype, requires_grad, backend):
    given = [t.detach()[None].requires_grad_(requires_grad) for t in inputs(dtype)]
    matrix = torch.rand(6, 6, dtype=torch.promote_types(dtype, torch.float32))
    matrix = None if added == "none" else matrix.requires_grad_(requires_grad)
    torch.library.opcheck(
        torch.ops.cvg_kernels.temporal_attention.default,
        (*given, matrix, 0.3, added == "band", True, capture, backend),
    )


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize(
    "arriving, needed",
    [
        ((True, True), (True, True, True, True)),
        ((True, False), (True, False, False, False)),
        ((False, True), (False, True, False, True)),
    ],
    ids=["all", "out-to-query", "maps-to-key-and-band"],
)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck_backward(arriving, needed, backend):
    given = [t.detach()[None] for t in inputs()]
    matrix = torch.rand(6, 6)
    module = {"native": _temporal_attention_native, "reference": _temporal_attention_reference}
    results = module[backend].forward(*given, matrix, 0.3, True, True)
    grads = [torch.randn_like(r) if yes else None for r, yes in zip(results, arriving, strict=True)]
    torch.library.opcheck(
        torch.ops.cvg_kernels.temporal_attention_backward.default,
        (*grads, *given, matrix, 0.3, True, True, *needed, backend),
    )


@NATIVE
def test_no_gradient_is_computed_that_nobody_asks_for(monkeypatch):
    """The kernel is told just what arrives and what is needed."""
    told = []

    def spy(*arguments):
        told.append(arguments)
        return backward(*arguments)

    backward = _temporal_attention_native.backward
    monkeypatch.setattr(_temporal_attention_native, "backward", spy)
    query, key, value = inputs(requires_grad=False)
    query.requires_grad_()
    with cvg.trace_backends() as ran:
        found = cvg.temporal_attention(query, key, value, sigma=1.0, capture=True, backend="native")
        found.maps.sum().backward()
    assert ran == [("temporal_attention", "native"), ("temporal_attention_backward", "native")]
    (arguments,) = told
    assert arguments[0] is None and arguments[1] is not None
    assert arguments[-4:] == (True, False, False, False)


def test_second_derivative_of_a_kernel_names_the_reference():
    given = inputs()
    out = cvg.temporal_attention(*given, sigma=1.0).out
    (grad,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3)], ids=str)
def test_results_lie_as_what_they_belong_to(axes):
    tensor = torch.empty(4, 3, 5, 6).permute(axes)
    assert dense_like(tensor).stride() == tensor.stride()
    widened = dense_like(tensor, 7)
    assert widened.shape == (*tensor.shape[:3], 7)
    assert widened.permute([axes.index(axis) for axis in range(4)]).is_contiguous()
    assert dense_like(tensor[..., ::2]).shape[-1] == 3


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", *CPU_BACKENDS])
@pytest.mark.drawn(8, of="long tests")
def test_fullgraph_compile(backend):
    """One graph forward, one backward, equal to eager; other sizes compile once more, then never again."""

    def attend(query, key, value, sigma, bias):
        banded = cvg.temporal_attention(query, key, value, sigma=sigma, capture=True, backend=backend)
        biased = cvg.temporal_attention(query, key, value, bias=bias, backend=backend)
        return banded.out.square().sum() + banded.maps.square().sum() + biased.out.square().sum()

    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=counter))
    graphs = []
    for positions, frames in ((4, 6), (7, 9), (9, 12)):
        query, key, value = (torch.randn(positions, frames, 2, 8).transpose(1, 2).requires_grad_() for _ in range(3))
        sigma = torch.tensor(1.5, requires_grad=True)
        bias = torch.randn(frames, frames, requires_grad=True)
        arguments = (query, key, value, sigma, bias)
        found = torch.autograd.grad(compiled(*arguments), arguments)
        wanted = torch.autograd.grad(attend(*arguments), arguments)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
        graphs.append(counter.graphs)
    assert graphs == [2, 4, 4]


# --- the C++ kernels -------------------------------------------------------------------------------------------------


_LEVEL_CHECK = """
import torch, cvg_kernels as cvg
from cvg_kernels import native
from tests.ops.temporal import assert_right
assert native.load("cpu").isa() == {level!r}
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for frames, dim in ((1, 1), (7, 5), (16, 40), (21, 20), (70, 33)):
        given = [torch.randn(3, frames, 2, dim).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
        bias = torch.randn(frames, frames).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        sigma, strength = (torch.tensor(x, dtype=bias.dtype, requires_grad=True) for x in (1.7, 0.9))
        for options in ({{"sigma": sigma, "strength": strength}}, {{"bias": bias}}):
            leaves = [*given, *options.values()]
            found = cvg.temporal_attention(*given, **options, capture=True, backend="native")
            cotangents = [torch.randn_like(t) for t in found]
            grads = list(torch.autograd.grad(found, leaves, cotangents))
            assert_right(found, grads, given, options, cotangents)
"""


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("level", EVERY_LEVEL)
def test_every_level_of_this_machine(level, fresh, tmp_path):
    fresh.right(_LEVEL_CHECK.format(level=level), tmp_path, CVG_CPU_ISA=level)


@NATIVE
def test_threads_do_not_change_a_bit():
    given = [torch.randn(300, 2, 9, 24, requires_grad=True) for _ in range(3)]
    sigma = torch.tensor(2.0, requires_grad=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            found = cvg.temporal_attention(*given, sigma=sigma, capture=True, backend="native")
            cotangents = [torch.randn_like(t) for t in found]
            results.append((*found, *torch.autograd.grad(found, [*given, sigma], cotangents)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# --- choice of backend, autocast, messages ---------------------------------------------------------------------------


def test_without_compiled_code(monkeypatch):
    """`auto` goes to the reference, gradient included; `native` by name says why it cannot."""
    monkeypatch.setattr(native, "reason", lambda target: "no compiler was found")
    given = inputs()
    sigma = torch.tensor(1.0, requires_grad=True)
    leaves = [*given, sigma]
    results = []
    for backend in ("auto", "reference"):
        with cvg.trace_backends() as ran:
            found = cvg.temporal_attention(*given, sigma=sigma, capture=True, backend=backend)
            loss = found.out.square().sum() + found.maps.square().sum()
            results.append(torch.autograd.grad(loss, leaves))
        assert ran[0] == ("temporal_attention", "reference")
    for grad, right in zip(*results, strict=True):
        torch.testing.assert_close(grad, right)
    with pytest.raises(cvg.BackendUnavailableError, match="'native'.*no compiler was found"):
        cvg.temporal_attention(*given, backend="native")


def test_the_row_maximum_can_be_held_fixed_by_the_closed_form(monkeypatch):
    monkeypatch.setattr(native, "reason", lambda target: "no compiler was found")
    given = inputs()
    grads = []
    for backend in ("auto", "reference"):
        out = cvg.temporal_attention(*given, sigma=1.0, row_max_grad=False, backend=backend).out
        grads.append(torch.autograd.grad(out.square().sum(), given))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "change",
    [{"frames": 129, "dtype": torch.float16}, {"frames": 33}, {"dim": 129}, {"dtype": torch.float64}],
    ids=str,
)
def test_triton_says_what_it_does_not_serve(change, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    shape = (1, 1, change.get("frames", 4), change.get("dim", 8))
    given = torch.zeros(3, *shape, dtype=change.get("dtype", torch.float32)).unbind(0)
    with pytest.raises(cvg.ArgumentError, match="not supported by backend 'triton'"):
        cvg.temporal_attention(*given, backend="triton")


def test_a_named_backend_does_not_fall_back():
    with pytest.raises(cvg.BackendUnavailableError, match="'cuda' cannot run temporal_attention: .* on cpu"):
        cvg.temporal_attention(*inputs(), backend="cuda")


def test_shapes_on_meta_tensors():
    given = [t.detach().to("meta") for t in inputs(torch.bfloat16)]
    out, maps = cvg.temporal_attention(*given, sigma=2.0, capture=True)
    assert out.shape == (5, 3, 6, 4) and out.dtype == torch.bfloat16
    assert maps.shape == (5, 6, 6) and maps.dtype == torch.float32


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_autocast_casts_as_for_stock_attention(backend):
    query, key, value = (t.detach() for t in inputs())
    cast = [t.bfloat16() for t in (query, key, value)]
    wanted = cvg.temporal_attention(*cast, sigma=2.0, capture=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = cvg.temporal_attention(query, key.bfloat16(), value, sigma=2.0, capture=True, backend=backend)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


GOOD = {name: torch.zeros(2, 2, 3, 4) for name in ("query", "key", "value")}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": torch.zeros(3, 4)}, r"query must be a tensor \[P, H, F, head_dim\]"),
        ({"value": None}, "value must be a tensor .*, got NoneType"),
        ({"query": torch.zeros(2, 2, 3, 4, dtype=torch.int32)}, "query must be float32"),
        ({"key": torch.zeros(2, 2, 3, 4).half()}, "key must have the query's dtype"),
        ({"key": torch.zeros(2, 2, 5, 4)}, "key must have the query's positions, heads and frames"),
        ({"value": torch.zeros(1, 2, 2, 3, 4)}, "value must have the query's positions"),
        ({"key": torch.zeros(2, 2, 3, 6)}, "key must have the query's head_dim 4, got 6"),
        ({"value": torch.zeros(2, 2, 3, 300)}, "head_dim of 1 to 256, got 300"),
        ({name: torch.zeros(2, 2, 0, 4) for name in GOOD}, "1 to 256 frames, got 0"),
        ({name: torch.zeros(1, 1, 257, 4) for name in GOOD}, "1 to 256 frames, got 257"),
        ({name: torch.zeros(2, 0, 3, 4) for name in GOOD}, "at least one head"),
        ({"sigma": 0.0}, "sigma must be above 0, got 0.0"),
        ({"sigma": float("nan")}, "sigma must be above 0, got nan"),
        ({"sigma": torch.tensor(-1.0)}, "sigma must be above 0, got -1.0"),
        ({"sigma": torch.ones(3)}, r"sigma must be a number or a 0-d .* got torch.float32 \(3,\)"),
        ({"sigma": "wide"}, "sigma must be a number or a 0-d tensor, got 'wide'"),
        ({"strength": torch.tensor(1)}, "strength must be a number or a 0-d floating-point"),
        ({"sigma": 1.0, "bias": torch.zeros(3, 3)}, "sigma and bias exclude each other"),
        ({"bias": torch.zeros(3, 4)}, r"bias must have shape \[F, F\] = \(3, 3\), got \(3, 4\)"),
        ({"bias": torch.ones(3, 3, dtype=torch.bool)}, "bias must be a floating-point tensor"),
        ({"bias": 1.0}, "bias must be a floating-point tensor .*, got float"),
        ({"scale": "big"}, "scale must be a number or None, got 'big'"),
        ({"backend": "fastest"}, "backend must be one of 'auto'"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.temporal_attention(**(GOOD | change))
