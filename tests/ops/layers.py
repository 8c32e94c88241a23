"""Every operation on one small layer of odd sizes, in the layouts that models have: for tests of how kernels are
called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

import cvg_kernels as cvg

_QUERIES, _KEYS, _FRAMES = 37, 21, 17


class Layer(NamedTuple):
    """Inputs, and the operation on them."""

    inputs: Callable[[torch.device], list[torch.Tensor]]
    call: Callable[..., tuple[torch.Tensor, ...]]  #: of the inputs and a backend
    tolerance: float  #: of results in the precision of the inputs, relative to the largest number


def _low(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def _heads(*shape: int) -> Callable[[torch.device], torch.Tensor]:
    """`[B, N, H, D]` seen as `[B, H, N, D]`."""
    return lambda device: torch.randn(shape).to(device, _low(device)).transpose(-3, -2)


def _of(*makers: Callable[[torch.device], torch.Tensor]) -> Callable:
    return lambda device: [make(device) for make in makers]


def _maps(*shape: int, dim: int = -1) -> Callable[[torch.device], torch.Tensor]:
    return lambda device: torch.randn(shape).softmax(dim).to(device)


def _attention(q, k, v, backend):
    return tuple(cvg.attention_with_capture(q, k, v, [1, 5, 5, 20], backend=backend))


def _with_bias(q, k, v, bias, backend):
    return tuple(cvg.attention_with_capture(q, k, v, [1, 20], token_bias=bias, backend=backend))


def _frame_band(q, k, v, backend):
    """Two tokens of no frame, then five frames of seven tokens."""
    frames = [-1, -1, *(frame for frame in range(5) for _ in range(7))]
    return tuple(cvg.frame_band_attention(q, k, v, frames, frames, sigma=1.5, backend=backend))


def _temporal(q, k, v, backend):
    return tuple(cvg.temporal_attention(q, k, v, sigma=4.0, capture=True, backend=backend))


def _temporal_maps(q, k, lse, backend):
    """Five frames of seven tokens behind two of a text, with a log-sum-exp and without."""
    starts = {"query_start": 2, "key_start": 2, "backend": backend}
    whole = cvg.temporal_maps(q, k, lse, (5, 7, 1), **starts)
    return whole, cvg.temporal_maps(q, k, None, (5, 7, 1), head_reduction="none", **starts)


def _path_flow(cross, first, second, backend):
    return (cvg.path_flow(cross, [first, second], temperature=0.05, backend=backend),)


_CROSS = _of(_heads(2, _QUERIES, 3, 40), _heads(2, _KEYS, 3, 40), _heads(2, _KEYS, 3, 40))
_BIAS = lambda device: torch.randn(2, 2, _QUERIES).to(device)
_HOP = _maps(1, 6, 5, 5)

#: Operation, or one way to call it → the layer. The operation is the first word.
LAYERS = {
    "attention": Layer(_CROSS, _attention, 1e-2),
    "attention wide": Layer(_of(*(_heads(2, n, 3, 64) for n in (_QUERIES, _KEYS, _KEYS))), _attention, 1e-2),
    "attention with bias": Layer(lambda device: [*_CROSS(device), _BIAS(device)], _with_bias, 1e-2),
    "frame_band_attention": Layer(_of(*(_heads(1, _QUERIES, 2, 24),) * 3), _frame_band, 1e-2),
    "temporal_attention": Layer(_of(*(_heads(5, _FRAMES, 2, 40),) * 3), _temporal, 1e-2),
    "temporal_maps": Layer(
        _of(*(_heads(2, _QUERIES, 3, 40),) * 2, lambda device: torch.rand(2, 3, _QUERIES).to(device) + 4),
        _temporal_maps,
        1e-2,
    ),
    "path_flow": Layer(_of(_maps(1, 3, 5, 6, dim=1), _HOP, _HOP), _path_flow, 1e-4),
    "min_max_matmul": Layer(
        _of(_maps(2, 9, 7), _maps(2, 7, 5)),
        lambda a, b, backend: (cvg.min_max_matmul(a, b, 0.05, backend=backend),),
        1e-4,
    ),
    "token_peaks": Layer(
        _of(_maps(1, 3, 4, 5, 6)), lambda flow, backend: (cvg.token_peaks(flow, backend=backend),), 1e-3
    ),
    "max_flow": Layer(
        _of(_maps(1, 3, 5, 6, dim=1), _HOP),
        lambda cross, hop, backend: (cvg.subgraph_max_flow(cross, [hop], backend=backend)[0],),
        1e-4,
    ),
    "guidance_mix": Layer(
        lambda device: [torch.randn(1, 4, 3, 5, 7).to(device, _low(device)) for _ in range(2)],
        lambda u, c, backend: (cvg.guidance_mix([u, c], [7.5], backend=backend),),
        1e-2,
    ),
}


def results(layer: Layer, inputs: list[torch.Tensor], grads: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    """Outputs, and the gradients of all inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = layer.call(*leaves, backend=backend)
    found = torch.autograd.grad(outputs, leaves, grads)
    return [*(output.detach() for output in outputs), *found]


def grads_of(layer: Layer, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Random gradients of the outputs."""
    with torch.no_grad():
        return [torch.randn_like(output) for output in layer.call(*inputs, backend="reference")]


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float) -> None:
    """Asserts that results differ by little of the largest number; what is exact elsewhere is tested there."""
    for have, want in zip(found, wanted, strict=True):
        assert have.shape == want.shape and torch.isfinite(have).all()
        have, want = have.double().cpu(), want.double().cpu()
        error = (have - want).abs().max().item()
        assert error <= tolerance * max(want.abs().max().item(), 1e-3), f"differs by {error:.2g}"
