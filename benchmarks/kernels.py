"""Every backend of every operation on one small layer, forward and backward: `make microbench`.

For a change of a kernel and what was before it: run with PYTEST_ARGS=--benchmark-autosave, then with
--benchmark-compare. What users could call instead is in the other benchmarks.
"""

from __future__ import annotations

import pytest
import torch

import cvg_kernels as cvg
from cvg_kernels.backends import OPERATIONS, Backend, unavailable_reason

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOW = torch.float16 if DEVICE.type == "cuda" else torch.float32  # some CUDA kernels take nothing else


def softmax(*shape: int, dim: int = -1) -> torch.Tensor:
    """Random attention."""
    return torch.randn(shape).softmax(dim)


def heads(*shape: int) -> torch.Tensor:
    """`[B, N, H, D]` seen as `[B, H, N, D]`, as layers have it."""
    return torch.randn(shape).transpose(1, 2)


#: Eight frames of 64 tokens.
FRAMES = torch.arange(8, dtype=torch.int32, device=DEVICE).repeat_interleave(64)

#: Operation → its inputs, and the call that takes them and a backend. Gradients go to all inputs.
CASES = {
    "attention": (
        lambda: [heads(2, 640, 5, 64), *(heads(2, 77, 5, 64) for _ in range(2))],
        lambda q, k, v, backend: cvg.attention_with_capture(q, k, v, [2, 5], backend=backend)[:2],
    ),
    "temporal_attention": (
        lambda: [heads(160, 16, 5, 64).to(LOW) for _ in range(3)],
        lambda q, k, v, backend: cvg.temporal_attention(q, k, v, sigma=4.0, backend=backend).out,
    ),
    "temporal_maps": (
        lambda: [heads(1, 16 * 160, 5, 64) for _ in range(2)],
        lambda q, k, backend: cvg.temporal_maps(q, k, None, (16, 10, 16), backend=backend),
    ),
    "frame_band_attention": (
        lambda: [heads(1, 512, 4, 64) for _ in range(3)],
        lambda *qkv, backend: cvg.frame_band_attention(*qkv, FRAMES, FRAMES, sigma=2.0, backend=backend).out,
    ),
    "path_flow": (
        lambda: [softmax(1, 20, 16, 160, dim=1), *(softmax(1, 160, 16, 16) for _ in range(2))],
        lambda cross, *hops, backend: cvg.path_flow(cross, hops, temperature=0.01, backend=backend),
    ),
    "token_peaks": (
        lambda: [torch.rand(1, 20, 16, 10, 16)],
        lambda flow, backend: cvg.token_peaks(flow, backend=backend),
    ),
    "max_flow": (
        lambda: [softmax(1, 4, 8, 16, dim=1), *(softmax(1, 16, 8, 8) for _ in range(2))],
        lambda cross, *hops, backend: cvg.subgraph_max_flow(cross, hops, backend=backend)[0],
    ),
    "coupled_max_flow": (
        lambda: [softmax(1, 2, 4, 16, dim=1), softmax(1, 16, 4, 4)],
        lambda cross, hop, backend: cvg.coupled_max_flow(cross, [hop], backend=backend)[0],
    ),
    "guidance_mix": (
        lambda: [torch.randn(1, 4, 16, 40, 64) for _ in range(3)],
        lambda *predictions, backend: cvg.guidance_mix(predictions, [1.5, 7.5], backend=backend),
    ),
}


def arms() -> list:
    """(operation, backend) of all that run here at full speed: interpreted Triton kernels do not.

    Specialised warps are left out: they take numbers of 16 bits, and these are of 32.
    """
    return [
        pytest.param(operation, backend.value, id=f"{operation}-{backend.value}")
        for operation in CASES
        for backend in OPERATIONS[operation]
        if (backend is not Backend.TRITON or DEVICE.type == "cuda")
        and backend is not Backend.TRITON_SPECIALISED
        and unavailable_reason(operation, backend, _device(backend)) is None
    ]


def _device(backend: Backend) -> torch.device:
    return torch.device("cpu") if backend is Backend.NATIVE else DEVICE


def _timed(call):
    """The call, waited for."""

    def run():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize(("operation", "backend"), arms())
def test_forward(benchmark, operation, backend):
    make, call = CASES[operation]
    benchmark.group = f"{operation}, forward"
    inputs = [tensor.to(_device(Backend(backend))) for tensor in make()]
    benchmark(_timed(lambda: call(*inputs, backend=backend)))


@pytest.mark.parametrize(("operation", "backend"), arms())
def test_forward_and_backward(benchmark, operation, backend):
    make, call = CASES[operation]
    benchmark.group = f"{operation}, forward and backward"
    leaves = [tensor.to(_device(Backend(backend))).requires_grad_() for tensor in make()]

    def both():
        results = call(*leaves, backend=backend)
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.grad(results, leaves, [torch.ones_like(result) for result in results])

    benchmark(_timed(both))
