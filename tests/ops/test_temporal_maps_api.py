"""temporal_maps as torch and its user see it: registration, compilation, threads, choice of backend, messages."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import cvg_kernels as cvg
from cvg_kernels import native
from cvg_kernels.ops import _temporal_maps_native
from tests.ops.checks import CPU_BACKENDS, NATIVE, Counter
from tests.ops.levels import EVERY_LEVEL

GRID, TEXT = (4, 2, 3), 5
TOKENS = 4 * 2 * 3 + TEXT


def inputs(dtype: torch.dtype = torch.float32, *, requires_grad: bool = True) -> list[torch.Tensor]:
    """Query and key of two samples, three heads and a video behind a text; a log-sum-exp above every logit."""
    made = [torch.randn(2, TOKENS, 3, 8, dtype=dtype).transpose(1, 2) for _ in range(2)]
    made.append((made[0].float() @ made[1].float().mT).logsumexp(-1))
    return [t.requires_grad_(requires_grad) for t in made]


def maps_of(query, key, lse, **options):
    return cvg.temporal_maps(query, key, lse, GRID, query_start=TEXT, key_start=TEXT, **options)


# --- registration ----------------------------------------------------------------------------------------------------


@pytest.mark.drawn(6)
@pytest.mark.parametrize(
    "dtype, with_lse, with_bias, head_mean, backend",
    [
        (torch.float32, True, True, True, "auto"),
        (torch.bfloat16, False, False, False, "auto"),
        (torch.float32, True, False, False, "reference"),
    ],
    ids=["all", "bf16-alone", "reference"],
)
def test_opcheck(dtype, with_lse, with_bias, head_mean, backend):
    query, key, lse = inputs(dtype)
    lse = lse.detach().requires_grad_() if with_lse else None
    bias = torch.randn(2, TOKENS) if with_bias else None
    video = (4, 6, TEXT, TEXT)
    torch.library.opcheck(
        torch.ops.cvg_kernels.temporal_maps.default, (query, key, lse, bias, *video, 0.3, head_mean, backend)
    )
    plain = [None if t is None else t.detach() for t in (query, key, lse, bias)]
    grad = torch.randn(*((2,) if head_mean else (2, 3)), 6, 4, 4)
    for needed in ([True, True, with_lse], [False, True, False]):
        torch.library.opcheck(
            torch.ops.cvg_kernels.temporal_maps_backward.default,
            (grad, *plain, *video, 0.3, head_mean, needed, backend),
        )


@NATIVE
def test_no_gradient_is_computed_that_nobody_asks_for(monkeypatch):
    """The kernel is told just what is needed."""
    told = []
    backward = _temporal_maps_native.backward

    def spy(call, grad_maps, targets):
        told.append([target is not None for target in targets])
        return backward(call, grad_maps, targets)

    monkeypatch.setattr(_temporal_maps_native, "backward", spy)
    for wanted in range(3):
        given = inputs(requires_grad=False)
        given[wanted].requires_grad_()
        maps_of(*given, backend="native").sum().backward()
        assert told[-1] == [at == wanted for at in range(3)]
        assert given[wanted].grad.stride() == given[wanted].stride()


def test_second_derivative_of_a_kernel_names_the_reference():
    given = inputs()
    (grad,) = torch.autograd.grad(maps_of(*given).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["auto", *CPU_BACKENDS])
@pytest.mark.drawn(8, of="long tests")
def test_fullgraph_compile(backend):
    """One graph forward, one backward, equal to eager; other sizes compile once more, then never again."""

    def loss(query, key, lse, frames, rows, text):
        grid = (frames, rows, 3)
        starts = {"query_start": text, "key_start": text}
        whole = cvg.temporal_maps(query, key, lse, grid, **starts, backend=backend)
        alone = cvg.temporal_maps(query, key, None, grid, **starts, head_reduction="none", backend=backend)
        return whole.square().sum() + alone.square().sum()

    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=counter))
    graphs = []
    for frames, rows, text in ((4, 2, 5), (5, 3, 7), (6, 4, 9)):
        tokens = frames * rows * 3 + text
        leaves = [torch.randn(2, tokens, 3, 8).transpose(1, 2) for _ in range(2)]
        leaves.append(torch.full((2, 3, tokens), 10.0))
        leaves = [t.requires_grad_() for t in leaves]
        found = torch.autograd.grad(compiled(*leaves, frames, rows, text), leaves)
        wanted = torch.autograd.grad(loss(*leaves, frames, rows, text), leaves)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
        graphs.append(counter.graphs)
    assert graphs == [2, 4, 4]


# --- the C++ kernels -------------------------------------------------------------------------------------------------


_LEVEL_CHECK = """
import torch, cvg_kernels as cvg
from cvg_kernels import native
assert native.load("cpu").isa() == {level!r}
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    cases = ((1, 1, 1), 1, 0), ((7, 1, 3), 5, 2), ((16, 2, 1), 40, 3), ((21, 1, 2), 20, 0), ((70, 1, 1), 33, 4)
    for grid, dim, text in cases:
        tokens = grid[0] * grid[1] * grid[2] + text
        q, k = (torch.randn(2, tokens, 2, dim).to(dtype).transpose(1, 2).requires_grad_() for _ in range(2))
        wide = torch.promote_types(dtype, torch.float32)
        mask = torch.randn(2, 1, 1, tokens, dtype=wide)
        lse = (q.detach().double() @ k.detach().double().mT).abs().logsumexp(-1).to(wide).requires_grad_()
        for total in (lse, None):
            for reduction in ("mean", "none"):
                given = [t for t in (q, k, total) if t is not None]
                exact = [t.detach().double().requires_grad_() for t in given]
                options = dict(query_start=text, key_start=text, head_reduction=reduction)
                mine = cvg.temporal_maps(*given[:2], total, grid, key_mask=mask, **options, backend="native")
                total_of = None if total is None else exact[2]
                options["key_mask"] = mask.double()
                want = cvg.temporal_maps(*exact[:2], total_of, grid, **options, backend="reference")
                cotangent = torch.randn(mine.shape, dtype=mine.dtype)
                grads = torch.autograd.grad(mine, given, cotangent)
                wanted = torch.autograd.grad(want, exact, cotangent.double())
                tolerance = {{torch.float64: 1e-12, torch.float32: 2e-5}}.get(dtype, 3e-2)
                for found, right in zip((mine, *grads), (want, *wanted)):
                    error = ((found.double() - right).abs().max() / right.abs().max().clamp_min(1e-3)).item()
                    assert error < tolerance, (dtype, grid, dim, reduction, error)
"""


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("level", EVERY_LEVEL)
def test_every_level_of_this_machine(level, fresh, tmp_path):
    fresh.right(_LEVEL_CHECK.format(level=level), tmp_path, CVG_CPU_ISA=level)


@NATIVE
def test_threads_do_not_change_a_bit():
    given = [torch.randn(2, 3, 9 * 100, 24, requires_grad=True) for _ in range(2)]
    given.append(torch.full((2, 3, 900), 8.0, requires_grad=True))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = cvg.temporal_maps(*given, (9, 10, 10), backend="native")
            results.append((found, *torch.autograd.grad(found.square().sum(), given)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# --- choice of backend, autocast, messages ---------------------------------------------------------------------------


def test_without_compiled_code(monkeypatch):
    """`auto` goes to the reference, gradient included; `native` by name says why it cannot."""
    monkeypatch.setattr(native, "reason", lambda target: "no compiler was found")
    given = inputs()
    results = []
    for backend in ("auto", "reference"):
        with cvg.trace_backends() as ran:
            loss = maps_of(*given, backend=backend).square().sum()
            results.append(torch.autograd.grad(loss, given))
        assert ran[0] == ("temporal_maps", "reference")
    for grad, right in zip(*results, strict=True):
        torch.testing.assert_close(grad, right)
    with pytest.raises(cvg.BackendUnavailableError, match="'native'.*no compiler was found"):
        maps_of(*given, backend="native")


@pytest.mark.parametrize(
    "change",
    [{"frames": 129, "dtype": torch.float16}, {"frames": 33}, {"dim": 129}, {"dtype": torch.float64}],
    ids=str,
)
def test_triton_says_what_it_does_not_serve(change, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    frames = change.get("frames", 4)
    given = torch.zeros(2, 1, 1, frames, change.get("dim", 8), dtype=change.get("dtype", torch.float32))
    with pytest.raises(cvg.ArgumentError, match="not supported by backend 'triton'"):
        cvg.temporal_maps(*given, None, (frames, 1, 1), backend="triton")


def test_shapes_on_meta_tensors():
    query, key, lse = (t.detach().to("meta") for t in inputs(torch.bfloat16))
    for reduction, shape in (("mean", (2, 6, 4, 4)), ("none", (2, 3, 6, 4, 4))):
        maps = maps_of(query, key, lse, head_reduction=reduction)
        assert maps.shape == shape and maps.dtype == torch.float32


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_autocast_casts_as_for_stock_attention(backend):
    """Query and key, and not the log-sum-exp, whose digits are those of the maps."""
    query, key, lse = (t.detach() for t in inputs())
    wanted = maps_of(query.bfloat16(), key.bfloat16(), lse, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = maps_of(query, key.bfloat16(), lse, backend=backend)
    assert torch.equal(found, wanted) and found.dtype == torch.float32


def test_a_mask_has_no_gradient_but_in_the_reference():
    given = inputs(requires_grad=False)
    mask = torch.zeros(2, 1, 1, TOKENS, requires_grad=True)
    with pytest.raises(cvg.ArgumentError, match="key_mask must not require a gradient"):
        maps_of(*given, key_mask=mask)
    found = maps_of(*given, key_mask=mask, backend="reference")
    (grad,) = torch.autograd.grad(found.sum(), mask)
    assert (grad[..., :TEXT] == 0).all() and (grad[..., TEXT:] != 0).any()


@pytest.mark.parametrize("shift", [-1e4, 3.0])
def test_a_mask_that_moves_every_key(shift):
    """The log-sum-exp moves with it, and the maps stay."""
    query, key, lse = inputs(requires_grad=False)
    wanted = maps_of(query, key, lse)
    mask = torch.full((2, 1, 1, TOKENS), shift)
    found = maps_of(query, key, lse + shift, key_mask=mask)
    torch.testing.assert_close(found, wanted, rtol=abs(shift) * 1e-6, atol=0)


GOOD = {"query": torch.zeros(2, 2, 9, 4), "key": torch.zeros(2, 2, 9, 4), "lse": None, "grid": (2, 2, 2)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": torch.zeros(3, 4)}, r"query must be a tensor \[B, H, length, head_dim\]"),
        ({"key": None}, "key must be a tensor .*, got NoneType"),
        ({"key": torch.zeros(2, 2, 9, 4).half()}, "key must have the query's dtype"),
        ({"key": torch.zeros(2, 3, 9, 4)}, "key must have the query's batch and heads"),
        ({"key": torch.zeros(2, 2, 9, 6)}, "key must have the query's head_dim 4, got 6"),
        ({"grid": (True, 2, 2)}, r"grid must be \(F, h, w\), numbers above 0, got \(True, 2, 2\)"),
        ({"grid": (2, 2)}, r"grid must be \(F, h, w\), numbers above 0, got \(2, 2\)"),
        ({"grid": (2, 0, 2)}, r"grid must be \(F, h, w\)"),
        ({"grid": 8}, r"grid must be \(F, h, w\), numbers above 0, got 8"),
        ({"grid": (3, 2, 2)}, r"behind query_start 0 must fit the 9 queries, and takes 12"),
        ({"query_start": False}, "query_start must be a number of tokens, 0 or more, got False"),
        ({"key_start": True}, "key_start must be a number of tokens, 0 or more, got True"),
        ({"query_start": 2}, r"behind query_start 2 must fit the 9 queries, and takes 10"),
        ({"key": torch.zeros(2, 2, 7, 4)}, "behind key_start 0 must fit the 7 keys, and takes 8"),
        ({"key_start": -1}, "key_start must be a number of tokens, 0 or more, got -1"),
        ({"key_start": 1.0}, "key_start must be a number of tokens, 0 or more, got 1.0"),
        ({"lse": 1.0}, r"lse must be a floating point tensor \[B, H, N\] or None, got float"),
        ({"lse": torch.zeros(2, 2, 8)}, r"lse must have shape \[B, H, N\] = \(2, 2, 9\)"),
        ({"lse": torch.zeros(2, 2, 9, dtype=torch.int64)}, "lse must be a floating point .*int64"),
        ({"lse": torch.zeros(2, 2, 9, device="meta")}, "lse must be on cpu, got meta"),
        ({"head_reduction": "sum"}, "head_reduction must be 'mean' or 'none', got 'sum'"),
        ({"key_mask": torch.zeros(2, 8, dtype=torch.bool)}, "key_mask must be bool"),
        ({"scale": "big"}, "scale must be a number or None, got 'big'"),
        ({"backend": "fastest"}, "backend must be one of 'auto'"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.temporal_maps(**(GOOD | change))
