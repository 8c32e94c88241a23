"""Inputs of attention with captured maps, and how near to its definition a backend must be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

import cvg_kernels as cvg
from cvg_kernels.reference import attention as reference
from tests.ops.backends import DEVICE, device_of
from tests.tolerance import assert_as_exact_as, assert_maps_exact


class Case(NamedTuple):
    """Sizes, as in the issue's contract, and the unusual thing about them."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    tokens: list[int]
    mask: str = "none"  # "bool", "additive", "rows" (one sample has no key at all)
    layout: str = "plain"  # "transposed", "expanded", "sliced"


CASES = [
    Case("cross-77", 2, 3, 45, 77, 40, 40, [1, 5, 76]),
    Case("one-of-everything", 1, 1, 1, 1, 1, 1, [0]),
    Case("one-query", 2, 2, 1, 19, 8, 8, [3]),
    Case("one-key", 2, 2, 21, 1, 16, 16, [0, 0]),
    Case("all-keys-captured", 1, 2, 9, 13, 4, 4, list(range(13))),
    Case("twice-the-same", 1, 2, 18, 33, 12, 12, [7, 7, 2]),
    Case("values-wider", 1, 2, 20, 24, 16, 48, [0, 23]),
    Case("values-narrower", 1, 2, 20, 24, 48, 5, [0, 23]),
    Case("head-dim-256", 1, 1, 17, 35, 256, 256, [34]),
    Case("head-dim-160", 1, 2, 17, 35, 160, 160, [34]),
    Case("head-dim-80", 1, 1, 40, 64, 80, 80, [0, 8]),
    Case("bool-mask", 3, 2, 30, 50, 24, 24, [0, 49], mask="bool"),
    Case("additive-mask", 2, 2, 30, 50, 32, 32, [0, 49], mask="additive"),
    Case("sample-without-keys", 2, 2, 10, 12, 16, 16, [4], mask="rows"),
    Case("heads-last", 2, 4, 33, 65, 64, 64, [9, 10], layout="transposed"),
    Case("expanded", 2, 4, 16, 20, 16, 16, [9], layout="expanded"),
    Case("every-other-dim", 1, 2, 16, 20, 10, 10, [9], layout="sliced"),
]
LONG = Case("long-keys", 1, 2, 130, 1500, 64, 64, [0, 700, 1499])


def tensors(case: Case, dtype: torch.dtype, device: torch.device = DEVICE):
    """Random query, key and value with the case's layout."""

    def make(length: int, dim: int) -> torch.Tensor:
        if case.layout == "transposed":
            made = torch.randn(case.batch, length, case.heads, dim).transpose(1, 2)
        elif case.layout == "expanded":
            made = torch.randn(case.batch, 1, length, dim).expand(-1, case.heads, -1, -1)
        elif case.layout == "sliced":
            made = torch.randn(case.batch, case.heads, length, 2 * dim)[..., ::2]
        else:
            made = torch.randn(case.batch, case.heads, length, dim)
        return made.to(device, dtype)

    return make(case.queries, case.dim), make(case.keys, case.dim), make(case.keys, case.value_dim)


def key_mask(case: Case, device: torch.device = DEVICE) -> torch.Tensor | None:
    if case.mask == "none":
        return None
    seen = torch.rand(case.batch, case.keys) < 0.6
    seen[:, case.tokens[0]] = True
    if case.mask == "rows":
        seen[0] = False
    if case.mask == "additive":
        return (3 * torch.randn(case.batch, 1, 1, case.keys)).to(device)
    return seen.to(device)


def additive(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Any mask as the float64 reference takes it."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.double()
    empty = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    return empty.masked_fill(~mask, -torch.inf)[:, None, None]


def exact_attention(case, query, key, value, mask, head_mean):
    """The definition in float64 on the very same (rounded) inputs; leaves for gradients included."""
    leaves = [t.detach().double().requires_grad_() for t in (query, key, value)]
    ids = torch.tensor(case.tokens, device=query.device).expand(case.batch, -1)
    options = {"scale": case.dim**-0.5, "mask": additive(mask)}
    outputs = reference.attention_with_capture(*leaves, ids, head_mean=head_mean, **options)[:3]
    weights = reference.probabilities(*leaves[:2], **options).weights
    peak = weights.detach().amax(-1)  # [B, H, N]
    return leaves, outputs, peak.mean(1) if head_mean else peak


def stock_attention(query, key, value, mask):
    """PyTorch's own attention in the input's dtype; a sample without keys is taken out by the caller."""
    leaves = [t.detach().clone().requires_grad_() for t in (query, key, value)]
    bias = None if mask is None else additive(mask).to(query.dtype)
    return leaves, scaled_dot_product_attention(*leaves, attn_mask=bias)


class Run(NamedTuple):
    """Inputs that take gradients, and the three outputs made of them."""

    leaves: list[torch.Tensor]
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # out, maps, lse

    def gradients(self, *cotangents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of all inputs, from the first outputs, one for each gradient that reaches them."""
        outputs = self.outputs[: len(cotangents)]
        wanted = [given.to(output.dtype) for given, output in zip(cotangents, outputs, strict=True)]
        return torch.autograd.grad(outputs, self.leaves, wanted, retain_graph=True)


def check_attention(backend, case, dtype, head_reduction, map_bound):
    """Forward and all three gradients, from all three outputs at once, within the error budget."""
    device = device_of(backend)
    inputs, mask = tensors(case, dtype, device), key_mask(case, device)
    ours = run_backend(backend, case, inputs, mask, head_reduction)
    leaves, outputs, peak = exact_attention(case, *inputs, mask, head_reduction == "mean")
    exact = Run(leaves, outputs)
    assert [t.dtype for t in ours.outputs] == [dtype, torch.float32, torch.float32]
    assert_maps_and_lse_exact(ours, exact, peak, map_bound)
    cotangents = [torch.randn_like(t) for t in ours.outputs]
    cotangents[2] *= torch.isfinite(exact.outputs[2])
    if case.mask == "rows":
        assert_zero_without_keys(ours, exact, cotangents, ~mask.any(-1))
    else:
        assert_as_exact_as_stock(backend, case, head_reduction == "mean", mask, ours, exact, cotangents)


def run_backend(backend, case, inputs, mask, head_reduction) -> Run:
    """The operation on copies of the inputs, and that this backend did it."""
    given = [t.detach().requires_grad_() for t in inputs]
    options = {"key_mask": mask, "head_reduction": head_reduction, "backend": backend}
    with cvg.trace_backends() as ran:
        found = cvg.attention_with_capture(*given, case.tokens, **options)
    assert ran == [("attention", backend)]
    return Run(given, tuple(found))


def assert_maps_and_lse_exact(ours: Run, exact: Run, peak, map_bound) -> None:
    """Of float32 whatever the inputs are; a row without keys has no finite log-sum-exp."""
    (_, maps, lse), (_, exact_maps, exact_lse) = ([t.detach() for t in run.outputs] for run in (ours, exact))
    assert_maps_exact(maps, exact_maps, peak, map_bound)
    seen = torch.isfinite(exact_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    assert_as_exact_as(lse[seen], exact_lse[seen].float(), exact_lse[seen], 8)


def assert_zero_without_keys(ours: Run, exact: Run, cotangents, dead) -> None:
    """A sample without any key has outputs and gradients of zero; stock attention, which has NaN, is not asked."""
    assert dead.any() and not dead.all()
    grads, exact_grads = ours.gradients(*cotangents), exact.gradients(*cotangents)
    out, maps, _ = ours.outputs
    for tensor in (out, maps, *grads):
        assert (tensor[dead] == 0).all()
    for tensor, wanted in zip((out, *grads), (exact.outputs[0], *exact_grads), strict=True):
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-4, atol=1e-5)


def assert_as_exact_as_stock(backend, case, head_mean, mask, ours: Run, exact: Run, cotangents) -> None:
    """The output, its gradients alone, and those of all three outputs at once, by what stock attention is off by."""
    stock_leaves, stock_out = stock_attention(*ours.leaves, mask)
    from_out = torch.autograd.grad(stock_out, stock_leaves, cotangents[0])
    depth = max(case.keys, case.dim, case.queries, 32)  # dP − δ of few keys cancels
    assert_as_exact_as(ours.outputs[0].detach(), stock_out.detach(), exact.outputs[0].detach(), depth=depth)

    # For tensor cores dS is rounded to 16 bit, with all three gradients that flow into it; the budget rounds dO's
    # only.
    factor = 2.5 if backend == "triton" and stock_out.dtype != torch.float32 else 1.5
    size = size_of_cancelled_terms(case, ours.leaves, cotangents[0])
    from_maps = eager_gradients_of_maps(case, head_mean, mask, stock_leaves, cotangents[1:])
    stock = [from_out[0].float() + from_maps[0], from_out[1].float() + from_maps[1], from_out[2]]
    for found, plain, wanted in zip(ours.gradients(*cotangents), stock, exact.gradients(*cotangents), strict=True):
        assert_as_exact_as(found, plain, wanted, factor, depth=depth, size=size)

    # What stock attention does too, the gradient of its output, is held to the stock path's own error.
    alone, exact_alone = ours.gradients(cotangents[0]), exact.gradients(cotangents[0])
    for found, plain, wanted in zip(alone, from_out, exact_alone, strict=True):
        assert_as_exact_as(found, plain, wanted, depth=depth, size=size)


def eager_gradients_of_maps(case, head_mean, mask, leaves, cotangents):
    """To query and key from maps and lse: the stock path has no maps, so their budget is an eager float32 run's."""
    wide = [t.detach().float().requires_grad_() for t in leaves]
    ids = torch.tensor(case.tokens, device=wide[0].device).expand(case.batch, -1)
    bias = None if mask is None else additive(mask).float()
    eager = reference.attention_with_capture(*wide, ids, scale=case.dim**-0.5, mask=bias, head_mean=head_mean)
    return torch.autograd.grad(eager[1:3], wide[:2], cotangents)


def size_of_cancelled_terms(case, inputs, grad_out) -> float:
    """Of one key P = 1: dP − δ cancels but for dlse, and dP k is what rounding is measured by."""
    if case.keys != 1:
        return 0.0
    query, key, value = inputs
    norms = [t.detach().double().norm(dim=-1).max().item() for t in (grad_out, value, query, key)]
    return case.dim**-0.5 * norms[0] * norms[1] * max(norms[2:])
