"""The tile algorithm of the CUDA kernels: on the CPU lane by lane, and by the kernels where there is a GPU.

On the CPU it is run as on three GPUs, which differ in the shared memory that a block has, with warps and lanes in any
order and a watch over shared memory; test_temporal_attention_cuda_faults.py shows what the watch sees.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import cvg_kernels as cvg
from cvg_kernels._layout import dense_like
from cvg_kernels.backends import Backend
from cvg_kernels.kernels import Facts
from cvg_kernels.ops import _choice
from cvg_kernels.ops import _temporal_attention_native as native
from tests.ops.emulated_tiles import SHARED, Emulated, replace_cuda
from tests.ops.temporal_cases import TILED, Case, check, each_gradient_alone, tensors


@pytest.fixture
def emulated(tiles, monkeypatch) -> Emulated:
    """The emulation in the place of `backend="cuda"`."""
    gpu = Emulated(tiles)
    replace_cuda(gpu, monkeypatch)
    return gpu


@pytest.fixture(params=["emulated", *TILED])
def device(request) -> torch.device:
    """Where the tensors of `backend="cuda"` lie: on a GPU, or on the CPU for the emulation."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        return torch.device("cpu")
    return torch.device(request.param)


CASES = [
    Case("videocrafter", 7, 3, 16, 64, 64, layout="heads-last"),
    Case("animatediff", 5, 2, 16, 40, 40, layout="unet"),
    Case("plain", 3, 2, 16, 32, 32, added="none"),
    Case("one-dim", 3, 2, 16, 1, 1),
    Case("odd-sizes", 7, 3, 17, 13, 29),
    Case("odd-frames", 5, 2, 31, 80, 80, layout="heads-last"),
    Case("values-narrow", 4, 2, 16, 48, 5),
    Case("values-wide", 4, 2, 16, 8, 72),
    Case("bias", 5, 3, 24, 24, 24, added="bias"),
    Case("causal", 4, 2, 19, 24, 24, added="causal"),
    Case("every-other-dim", 4, 2, 16, 20, 20, layout="sliced"),
    Case("strong", 4, 2, 16, 32, 32, sigma=1.0, strength=3.0),
    Case("weakening", 4, 2, 16, 32, 32, strength=-0.5),
    Case("head-dim-160", 3, 1, 16, 160, 160, layout="unet"),
    Case("three-warps", 3, 2, 33, 40, 40, sigma=6.0),
    Case("four-warps", 2, 2, 64, 64, 64, sigma=8.0, layout="heads-last"),
    Case("eight-warps", 3, 1, 128, 16, 16, sigma=12.0),
    Case("eight-warps-padded", 2, 1, 65, 24, 24),
]
by_name = {"ids": lambda case: case.name if isinstance(case, Case) else None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, **by_name)
@pytest.mark.drawn(36)
def test_forward_and_gradients(device, case, dtype):
    check("cuda", case, dtype, device)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("gpu", SHARED)
@pytest.mark.parametrize("frames, dim", [(128, 160), (100, 96), (20, 24), (9, 160)])
def test_every_plan_of_shared_memory(emulated, frames, dim, gpu):
    """Tensors that take turns in the same memory, where a block has little, do so behind barriers."""
    emulated.shared_bytes = SHARED[gpu]
    check("cuda", Case("", 3, 1, frames, dim, dim, sigma=9.0), torch.float16)


@pytest.mark.parametrize("frames", [16, 31, 64])
def test_without_maps_the_output_is_the_same(device, frames):
    given = tensors(Case("", 7, 3, frames, 40, 40, layout="unet"), torch.bfloat16, device)
    found = cvg.temporal_attention(*given, sigma=2.0, capture=True, backend="cuda")
    alone = cvg.temporal_attention(*given, sigma=2.0, backend="cuda")
    assert torch.equal(alone.out, found.out) and alone.maps is None


@pytest.mark.parametrize("row_max_grad", [True, False])
@pytest.mark.parametrize("added", ["none", "band", "bias"])
def test_each_gradient_alone(device, added, row_max_grad):
    """A gradient from one output only, to one input only, is that of the definition."""
    case = Case("", 6, 2, 17, 16, 24, added=added)
    each_gradient_alone("cuda", case, torch.float16, device, row_max_grad)


def test_the_gradient_of_the_row_maximum_goes_to_the_first_of_a_tie(device):
    query = torch.tensor([1.0, 0.0], device=device).expand(1, 1, 16, 2).half()
    key = torch.zeros(1, 1, 16, 2, device=device).half()
    key[0, 0, [3, 9, 12], 0] = 2.0
    key.requires_grad_()
    value = torch.eye(16, device=device).half()[None, None]
    grads = []
    for row_max_grad in (True, False):
        out = cvg.temporal_attention(query, key, value, sigma=1.0, row_max_grad=row_max_grad, backend="cuda").out
        grads.append(torch.autograd.grad(out[0, 0, 3, 3], key)[0])
    moved = (grads[0] - grads[1]).abs().amax((0, 1, 3))
    assert moved[3] > 0.1 and moved.sum() == moved[3]


def test_a_row_without_keys(device):
    """It gives 0 and takes no gradient; the others are as without it."""
    given = tensors(Case("", 3, 2, 18, 16, 16), torch.float16, device)
    query, key, value = (t.requires_grad_() for t in given)
    bias = torch.zeros(18, 18, device=device)
    bias[2], bias[:, 5] = -torch.inf, -torch.inf
    bias.requires_grad_()
    found = cvg.temporal_attention(query, key, value, bias=bias, capture=True, backend="cuda")
    rows, keys = [[i for i in range(18) if i != without] for without in (2, 5)]
    wanted = scaled_dot_product_attention(query[:, :, rows], key[:, :, keys], value[:, :, keys])
    torch.testing.assert_close(found.out[:, :, rows], wanted, rtol=4e-3, atol=2e-3)
    assert (found.out[:, :, 2] == 0).all() and (found.maps[:, 2] == 0).all()
    loss = found.out.square().sum() + found.maps.square().sum()
    grads = torch.autograd.grad(loss, (query, key, value, bias))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][:, :, 2] == 0).all()


def test_nan_stays_where_it_is(device):
    """A sequence that holds a NaN says so, and says it to no other sequence, though they share a block."""
    given = tensors(Case("", 9, 2, 23, 16, 16), torch.bfloat16, device)
    clean = cvg.temporal_attention(*given, sigma=2.0, capture=True, backend="cuda")
    given[0][2, 1, 3] = torch.nan
    out, maps = cvg.temporal_attention(*given, sigma=2.0, capture=True, backend="cuda")
    assert out[2, 1, 3].isnan().all() and maps[2, 3].isnan().all()
    hurt = torch.zeros_like(out, dtype=torch.bool)
    hurt[2, 1, 3] = True
    torch.testing.assert_close(out[~hurt], clean.out[~hurt], rtol=0, atol=0)


@pytest.mark.parametrize("frames, dim", [(17, 24), (31, 13), (48, 40)])
def test_nothing_is_written_beyond_the_results(device, monkeypatch, frames, dim):
    """Results inside a larger tensor; around them stays what was there."""
    seen = []

    def inside(tensor: torch.Tensor, last: int | None = None) -> torch.Tensor:
        around = dense_like(tensor, (last or tensor.shape[-1]) + 16)
        around.fill_(7.0)
        seen.append(around)
        return around[..., 8:-8]

    monkeypatch.setattr(native, "dense_like", inside)
    given = tensors(Case("", 3, 2, frames, dim, dim), torch.float16, device)
    given = [t[None].requires_grad_() for t in given]
    grad = torch.randn_like(given[0])
    native.forward(*given, None, 0.3, False, True)
    needed = (True, True, True, False)
    native.backward(grad, None, *given, None, 0.3, False, True, *needed)
    assert len(seen) == 4
    for around in seen:
        assert (around[..., :8] == 7).all() and (around[..., -8:] == 7).all()
        assert not (around[..., 8:-8] == 7).all()


def test_no_positions(device):
    given = [t.requires_grad_() for t in tensors(Case("", 0, 2, 16, 8, 8), torch.float16, device)]
    sigma = torch.tensor(1.0, device=device, requires_grad=True)
    out, maps = cvg.temporal_attention(*given, sigma=sigma, capture=True, backend="cuda")
    assert out.shape == (0, 2, 16, 8) and maps.shape == (0, 16, 16)
    grads = torch.autograd.grad(out.sum() + maps.sum(), [*given, sigma])
    assert grads[0].shape == (0, 2, 16, 8) and grads[3] == 0


@pytest.mark.parametrize("backend", TILED)
def test_half_a_million_sequences(backend):
    """524 288 of them, in more than 65 535 blocks, where stock kernels failed; the last ones are right."""
    given = torch.randn(3, 65_536, 8, 16, 8, device="cuda", dtype=torch.float16).unbind(0)
    found = cvg.temporal_attention(*given, sigma=2.0, capture=True, backend=backend)
    alone = cvg.temporal_attention(*given, sigma=2.0, backend=backend)
    last = [t[-9:].double() for t in given]
    wanted = cvg.temporal_attention(*last, sigma=2.0, capture=True, backend="reference")
    for out in (found.out, alone.out):
        torch.testing.assert_close(out[-9:].double(), wanted.out, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(found.maps[-9:].double(), wanted.maps, rtol=1e-4, atol=1e-5)


# --- who is served ---------------------------------------------------------------------------------------------------


def on_gpu(frames: int, dim: int, dtype: torch.dtype) -> Facts:
    return Facts(torch.device("cuda"), dtype, frames=frames, head_dim=dim, value_dim=dim)


@pytest.mark.parametrize(
    "served, refused",
    [
        ((16, 160, torch.float16), ("frames 15", 15, 64, torch.float16)),
        ((128, 1, torch.bfloat16), ("frames 129", 129, 64, torch.float16)),
        ((128, 160, torch.float16), ("head_dim 161", 16, 161, torch.bfloat16)),
        ((16, 40, torch.float16), ("dtype torch.float32", 16, 40, torch.float32)),
    ],
)
def test_limits_are_named(monkeypatch, served, refused):
    monkeypatch.setattr(_choice, "unavailable_reason", lambda *call: None)
    chosen = _choice.kernel_for("temporal_attention", "cuda", on_gpu(*served))
    assert chosen == (Backend.CUDA, native)
    what, *sizes = refused
    with pytest.raises(cvg.ArgumentError, match=what) as raised:
        _choice.kernel_for("temporal_attention", "cuda", on_gpu(*sizes))
    assert "'cuda'" in str(raised.value)


def test_auto_is_not_the_cuda_kernels(monkeypatch):
    """Nobody has measured that they are faster."""
    monkeypatch.setattr(_choice, "unavailable_reason", lambda *call: None)
    chosen = _choice.kernel_for("temporal_attention", "auto", on_gpu(16, 64, torch.float16))
    assert chosen.backend is Backend.TRITON
