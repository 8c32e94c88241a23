"""frame_band_attention as an operation of torch: registration, gradients in float64, compilation, memory, messages."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import cvg_kernels as cvg
from cvg_kernels import native
from cvg_kernels.ops import _attention_op as operation
from cvg_kernels.ops._attention_call import AttentionCall, Band
from tests.ops.checks import CPU_BACKENDS, NATIVE, Counter
from tests.ops.levels import EVERY_LEVEL

QUERY_FRAMES = torch.tensor([-1, 0, 0, 1, 1, 2, 2], dtype=torch.int32)
KEY_FRAMES = torch.tensor([-1, -1, 0, 0, 2], dtype=torch.int32)
BAND = Band(QUERY_FRAMES, KEY_FRAMES, 1.5, 0.8, True)


def call_of(tensors) -> AttentionCall:
    return AttentionCall(*tensors, torch.tensor([[1, 1], [0, 4]]), None, None, BAND, 0.3, True)


def inputs(dtype=torch.float32, requires_grad=True):
    lengths = ((7, 6), (5, 6), (5, 4))
    return [
        torch.randn(2, length, 3, dim, dtype=dtype).transpose(1, 2).requires_grad_(requires_grad)
        for length, dim in lengths
    ]


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("row_max_grad", [True, False])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradcheck(backend, row_max_grad):
    """Against finite differences; with m held fixed there is none to compare with but the reference."""
    given = inputs(torch.float64)

    def attend(backend, *tensors):
        return tuple(
            cvg.frame_band_attention(
                *tensors, QUERY_FRAMES, KEY_FRAMES, sigma=1.5, row_max_grad=row_max_grad, backend=backend
            )
        )

    if row_max_grad:
        assert torch.autograd.gradcheck(lambda *tensors: attend(backend, *tensors), given)
        return
    cotangents = [torch.randn_like(t) for t in attend(backend, *given)]
    grads = [torch.autograd.grad(attend(name, *given), given, cotangents) for name in (backend, "reference")]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_the_reference_is_differentiable_twice():
    def attend(*tensors):
        return cvg.frame_band_attention(*tensors, QUERY_FRAMES, KEY_FRAMES, sigma=1.5, backend="reference").out

    assert torch.autograd.gradgradcheck(attend, inputs(torch.float64), fast_mode=True)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck_forward(backend, dtype):
    torch.library.opcheck(
        torch.ops.cvg_kernels.attention.default, (*operation.flat(call_of(inputs(dtype))), True, backend)
    )


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    "arriving, needed",
    [
        ((True, True, True), (True, True, True)),
        ((True, False, False), (True, False, False)),
        ((True, False, True), (False, False, True)),
        ((False, True, True), (False, True, False)),
    ],
    ids=["everything", "to-query", "to-value", "maps-and-lse-to-key"],
)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck_backward(arriving, needed, backend):
    call = operation.flat(call_of(inputs(requires_grad=False)))
    results = torch.ops.cvg_kernels.attention.default(*call, True, backend)
    grads = [torch.randn_like(r) if yes else None for r, yes in zip(results[:3], arriving, strict=True)]
    torch.library.opcheck(
        torch.ops.cvg_kernels.attention_backward.default,
        (*grads, *call, results[0], *results[2:], [*needed, False], True, backend),
    )


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_each_gradient_alone_is_that_of_all(backend):
    given = inputs()
    found = cvg.frame_band_attention(*given, QUERY_FRAMES, KEY_FRAMES, sigma=1.5, backend=backend)
    for outputs in (found[:1], found[1:], found):
        cotangents = [torch.randn_like(t) for t in outputs]
        options = {"retain_graph": True, "allow_unused": True}  # lse does not depend on value
        together = torch.autograd.grad(outputs, given, cotangents, **options)
        for tensor, right in zip(given, together, strict=True):
            (alone,) = torch.autograd.grad(outputs, tensor, cotangents, **options)
            assert (alone is None) == (right is None)
            if right is not None:
                torch.testing.assert_close(alone, right)


def test_second_derivative_of_a_kernel_names_the_reference():
    given = inputs()
    out = cvg.frame_band_attention(*given, QUERY_FRAMES, KEY_FRAMES, sigma=1.0).out
    (grad,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("backend", ["auto", *CPU_BACKENDS])
def test_fullgraph_compile(backend):
    """One graph forward, one backward, equal to eager; other sizes compile once more, then never again."""

    def attend(query, key, value, frames):
        found = cvg.frame_band_attention(query, key, value, frames, frames, sigma=1.5, backend=backend)
        return found.out.square().sum() + found.lse.square().sum()

    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=counter))
    graphs = []
    for tokens in (6, 9, 14):
        given = [torch.randn(2, tokens, 3, 8).transpose(1, 2).requires_grad_() for _ in range(3)]
        frames = torch.arange(tokens) // 2
        found = torch.autograd.grad(compiled(*given, frames), given)
        wanted = torch.autograd.grad(attend(*given, frames), given)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
        graphs.append(counter.graphs)
    # torch 2.6 compiles for each layout of a symbol
    assert graphs == [2, 4, 4] or (graphs == [2, 4, 6] and torch.__version__ < "2.8")


def test_shapes_on_meta_tensors():
    given = [t.detach().to("meta") for t in inputs(torch.bfloat16)]
    found = cvg.frame_band_attention(*given, QUERY_FRAMES, KEY_FRAMES, sigma=2.0)
    assert found.out.shape == (2, 3, 7, 4) and found.out.dtype == torch.bfloat16
    assert found.lse.shape == (2, 3, 7) and found.lse.dtype == torch.float32


# --- the C++ kernels -------------------------------------------------------------------------------------------------


_LEVEL_CHECK = """
import torch, cvg_kernels as cvg
from cvg_kernels import native
assert native.load("cpu").isa() == {level!r}
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for tokens, dim in ((1, 1), (7, 5), (35, 40), (523, 20)):
        q, k, v = (torch.randn(1, tokens, 2, dim).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))
        frames = torch.arange(tokens) // 6 - 1
        exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
        mine = cvg.frame_band_attention(q, k, v, frames, frames, sigma=1.5, backend="native")
        want = cvg.frame_band_attention(*exact, frames, frames, sigma=1.5, backend="reference")
        cotangents = [torch.randn_like(t) for t in mine]
        grads = torch.autograd.grad(mine, (q, k, v), cotangents)
        wanted = torch.autograd.grad(want, exact, [c.double() for c in cotangents])
        tolerance = {{torch.float64: 1e-12, torch.float32: 2e-5}}.get(dtype, 3e-2)
        for found, right in zip((*mine, *grads), (*want, *wanted)):
            error = ((found.double() - right).abs().max() / right.abs().max().clamp_min(1e-3)).item()
            assert error < tolerance, (dtype, tokens, dim, error)
"""


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("level", EVERY_LEVEL)
def test_every_level_of_this_machine(level, fresh, tmp_path):
    fresh.right(_LEVEL_CHECK.format(level=level), tmp_path, CVG_CPU_ISA=level)


@NATIVE
def test_threads_do_not_change_a_bit():
    given = [torch.randn(1, 2, 700, 24, requires_grad=True) for _ in range(3)]
    frames = torch.arange(700) // 100
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            found = cvg.frame_band_attention(*given, frames, frames, sigma=1.0, backend="native")
            cotangents = [torch.randn_like(t) for t in found]
            results.append((*found, *torch.autograd.grad(found, given, cotangents)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


_MEMORY_CHECK = """
import resource, torch, cvg_kernels as cvg
torch.set_num_threads(1)
tokens = 8192
given = [torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(3)]
def attend(rows):
    few = [t[:, :, :rows] for t in given]
    frames = torch.arange(rows) // 64
    cvg.frame_band_attention(*few, frames, frames, sigma=1.0, backend="native").out.sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = attend(64)
grown = attend(tokens) - small
assert grown < 64, grown  # MiB; the N×N matrix alone would be 256
"""


@pytest.mark.drawn(8, of="long tests")
@NATIVE
def test_the_square_matrix_is_never_held():
    subprocess.run([sys.executable, "-c", _MEMORY_CHECK], check=True)


def test_without_compiled_code(monkeypatch):
    """`auto` goes to the reference, gradient included; `native` by name says why it cannot."""
    monkeypatch.setattr(native, "reason", lambda target: "no compiler was found")
    given = inputs()
    results = []
    for backend in ("auto", "reference"):
        with cvg.trace_backends() as ran:
            found = cvg.frame_band_attention(
                *given, QUERY_FRAMES, KEY_FRAMES, sigma=1.0, row_max_grad=False, backend=backend
            )
            results.append(torch.autograd.grad(found.out.square().sum() + found.lse.sum(), given))
        assert ran[0] == ("frame_band_attention", "reference")
    for grad, right in zip(*results, strict=True):
        torch.testing.assert_close(grad, right)
    with pytest.raises(cvg.BackendUnavailableError, match="'native'.*no compiler was found"):
        cvg.frame_band_attention(*given, QUERY_FRAMES, KEY_FRAMES, sigma=1.0, backend="native")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_no_queries(backend):
    query, key, value = inputs()
    found = cvg.frame_band_attention(query[:, :, :0], key, value, [], KEY_FRAMES, sigma=1.0, backend=backend)
    assert found.out.shape == (2, 3, 0, 4) and found.lse.shape == (2, 3, 0)
    for grad in torch.autograd.grad(found.out.sum(), (key, value)):
        assert (grad == 0).all()


GOOD = {
    "query": torch.zeros(2, 2, 3, 4),
    "key": torch.zeros(2, 2, 3, 4),
    "value": torch.zeros(2, 2, 3, 4),
    "query_frames": [0, 0, 1],
    "key_frames": [0, 0, 1],
    "sigma": 1.0,
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": torch.zeros(3, 4)}, r"query must be a tensor \[B, H, length, head_dim\]"),
        ({"key": torch.zeros(2, 2, 3, 6)}, "key must have the query's head_dim 4, got 6"),
        ({"query_frames": [0, 1]}, r"query_frames must have shape \(3,\), got \(2,\)"),
        ({"key_frames": torch.zeros(3, 1)}, r"key_frames must have shape \(3,\), got \(3, 1\)"),
        ({"key_frames": torch.zeros(3)}, "key_frames must be int64 or int32, got torch.float32"),
        ({"key_frames": torch.zeros(3).cfloat()}, "key_frames must be int64 or int32, got torch.complex64"),
        ({"key_frames": "all"}, "key_frames must be integers, one per token, got 'all'"),
        ({"query_frames": [0, -2, 1]}, r"query_frames must lie in \[-1, 16777215\], got -2"),
        ({"query_frames": [0, 2**24, 1]}, r"query_frames must lie in .*, got 16777216"),
        ({"sigma": 0.0}, "sigma must be above 0, got 0.0"),
        ({"sigma": float("nan")}, "sigma must be above 0, got nan"),
        ({"sigma": None}, "sigma must be a number, got None"),
        ({"strength": float("inf")}, "strength must be finite, got inf"),
        ({"strength": "big"}, "strength must be a number, got 'big'"),
        ({"scale": "big"}, "scale must be a number or None, got 'big'"),
        ({"backend": "fastest"}, "backend must be one of 'auto'"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.frame_band_attention(**(GOOD | change))
