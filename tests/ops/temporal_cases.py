"""Layers of temporal attention, and how a backend is held to float64 on them."""

from __future__ import annotations

from typing import NamedTuple

import torch

import cvg_kernels as cvg
from tests.ops.backends import DEVICE, backends, device_of
from tests.ops.temporal import assert_right

TILED = backends("temporal_attention", "cuda")  # 16 to 128 frames, in bfloat16 and float16


class Case(NamedTuple):
    """Sizes, what is added to the logits, and how the tensors lie."""

    name: str
    positions: int
    heads: int
    frames: int
    dim: int
    value_dim: int
    added: str = "band"  # "none", "bias", "causal"
    layout: str = "plain"  # "heads-last", "unet" ([b, h·w, F, heads, D] seen through permute), "sliced"
    sigma: float = 2.0
    strength: float = 1.0


def tensors(case: Case, dtype: torch.dtype, device: torch.device = DEVICE) -> list[torch.Tensor]:
    """Random query, key and value with the case's layout; the unet's has a batch of its own."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(device, dtype)

    def make(dim: int) -> torch.Tensor:
        p, h, f = case.positions, case.heads, case.frames
        if case.layout == "heads-last":
            made = random(p, f, h, dim).transpose(1, 2)
        elif case.layout == "unet":
            made = random(2 * f, p, h * dim).unflatten(0, (2, f)).unflatten(-1, (h, dim))
            made = made.permute(0, 2, 3, 1, 4)
        elif case.layout == "sliced":
            made = random(p, h, f, 2 * dim)[..., ::2]
        else:
            made = random(p, h, f, dim)
        assert case.layout == "plain" or min(p, h, f, dim) == 1 or not made.is_contiguous()
        return made

    return [make(case.dim), make(case.dim), make(case.value_dim)]


def regulariser(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """The arguments beside the tensors, each a tensor that requires a gradient."""
    if case.added == "none":
        return {}
    if case.added == "band":
        numbers = {"sigma": case.sigma, "strength": case.strength}
        return {
            name: torch.tensor(number, dtype=dtype, device=device, requires_grad=True)
            for name, number in numbers.items()
        }
    bias = torch.randn(case.frames, case.frames, dtype=dtype, device=device)
    if case.added == "causal":
        bias = bias.masked_fill(torch.ones_like(bias).triu(1).bool(), -torch.inf)
    return {"bias": bias.requires_grad_()}


def check(
    backend: str, case: Case, dtype: torch.dtype, device: torch.device | None = None, row_max_grad: bool = True
) -> None:
    """Forward and every gradient, from both outputs at once, within the budget of eager code of the same precision."""
    device = device or device_of(backend)
    given = [t.requires_grad_() for t in tensors(case, dtype, device)]
    options = regulariser(case, torch.float32, device)
    with cvg.trace_backends() as ran:
        out, maps = cvg.temporal_attention(*given, **options, capture=True, row_max_grad=row_max_grad, backend=backend)
        leaves = [*given, *options.values()]
        cotangents = [torch.randn_like(out), torch.randn_like(maps)]
        grads = torch.autograd.grad([out, maps], leaves, cotangents, retain_graph=True)
    backward = [] if backend == "reference" else [("temporal_attention_backward", backend)]
    assert ran == [("temporal_attention", backend), *backward]
    assert out.dtype == dtype and maps.dtype == torch.float32
    assert out.shape == (*given[0].shape[:-1], case.value_dim)
    if case.layout == "heads-last":
        assert backend == "reference" or out.transpose(1, 2).is_contiguous()

    assert_right((out, maps), grads, given, options, cotangents, row_max_grad)


def each_gradient_alone(
    backend: str, case: Case, dtype: torch.dtype, device: torch.device, row_max_grad: bool = True
) -> None:
    """A gradient from one output only, to one input only."""
    given = tensors(case, dtype, device)
    options = regulariser(case, torch.float32, device)
    options = {name: t.detach() for name, t in options.items()}
    for which in range(2):
        for wrt in range(3 + len(options)):
            if (which, wrt) == (1, 2):
                continue  # maps do not depend on the values
            leaves = [t.detach() for t in (*given, *options.values())]
            leaves[wrt].requires_grad_()
            found = cvg.temporal_attention(
                *leaves[:3],
                **dict(zip(options, leaves[3:], strict=True)),
                capture=True,
                row_max_grad=row_max_grad,
                backend=backend,
            )[which]
            cotangents: list[torch.Tensor | None] = [None, None]
            cotangents[which] = torch.randn_like(found)
            grads: list[torch.Tensor | None] = [None] * len(leaves)
            (grads[wrt],) = torch.autograd.grad(found, leaves[wrt], cotangents[which])
            assert_right((None, None), grads, given, options, cotangents, row_max_grad)
