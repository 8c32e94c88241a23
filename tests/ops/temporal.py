"""What temporal attention is to give: in float64, and how far off results of a precision may be."""

from __future__ import annotations

import torch

from tests.tolerance import assert_as_exact_as, assert_maps_exact, assert_sum_as_exact_as


def eager(query, key, value, *, sigma=None, strength=None, bias=None, row_max_grad=True, nothing=0.0):
    """What a user writes today, in the dtype of the input; `nothing` is added for its gradient, that of q kᵀ.

    Sigma, strength and bias may be tensors `[..., H, F, F]`: a copy for each logit.
    """
    scores = torch.einsum("...id,...jd->...ij", query, key) * query.shape[-1] ** -0.5 + nothing
    if sigma is not None:
        at = torch.arange(query.shape[-2], device=query.device, dtype=query.dtype)
        band = (-(at[:, None] - at).square() / (2 * sigma**2)).exp()
        highest = scores.max(-1, keepdim=True).values
        scores = scores + strength * (highest if row_max_grad else highest.detach()) * band
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(-1)
    return weights @ value, weights.mean(-3)


def _gradients(dtype, given, options, cotangents, row_max_grad, copies):
    """Outputs of `eager` in a dtype, and the gradients of the inputs, of the options and of q kᵀ.

    With `copies` the options' are those of each logit's own copy: the terms that their gradients are sums of.
    """
    square = (*given[0].shape[:-1], given[0].shape[-2])
    leaves = [t.detach().to(dtype).requires_grad_() for t in given]
    wide = [t.detach().to(dtype) for t in options.values()]
    wide = [(t.expand(square).clone() if copies else t).requires_grad_() for t in wide]
    nothing = torch.zeros(square, dtype=dtype, device=given[0].device, requires_grad=True)
    added = dict(zip(options, wide, strict=True))
    outputs = eager(*leaves, **added, row_max_grad=row_max_grad, nothing=nothing)
    used = [at for at, cotangent in enumerate(cotangents) if cotangent is not None]
    grads = torch.autograd.grad(
        [outputs[at] for at in used],
        [*leaves, *wide, nothing],
        [cotangents[at].to(dtype) for at in used],
        materialize_grads=True,
    )
    return [output.detach() for output in outputs], grads[:3], grads[3:-1], grads[-1]


def assert_right(
    found: tuple[torch.Tensor | None, torch.Tensor | None],
    grads: list[torch.Tensor | None],
    given: list[torch.Tensor],
    options: dict[str, torch.Tensor],
    cotangents: list[torch.Tensor | None],
    row_max_grad: bool = True,
) -> None:
    """Asserts that outputs and gradients are right within the budget of eager code of the same precision.

    Args:
        found: out and maps.
        grads: of query, key and value, then of the options.
        given: query, key and value.
        options: of sigma and strength, or of bias, in float32.
        cotangents: the gradients of out and maps, as they were given to the kernel.
        row_max_grad: whether a gradient flows through m.

    What is `None` is not compared; a cotangent that is `None` is 0.
    """
    dtype, frames, dim = given[0].dtype, *given[0].shape[-2:]
    call = (given, options, cotangents, row_max_grad)
    exact, exact_grads, exact_terms, grad_scores = _gradients(torch.float64, *call, True)
    stock, stock_grads, _, _ = _gradients(dtype, *call, False)
    # a rounding of m reaches the logits `strength` times
    depth = max(frames, dim, given[2].shape[-1], 32) * (1 + abs(float(options.get("strength", 0)))) ** 2
    out, maps = (None if t is None else t.detach() for t in found)
    if maps is not None:
        bound = 2e-6 if dtype == torch.float32 else 5e-6
        assert_maps_exact(maps.mT, exact[1].mT, exact[1].amax(-1), bound)
    if out is not None:
        assert_as_exact_as(out, stock[0], exact[0], depth=depth)
    # What cancels, all of it with a single frame, whose logits have no gradient, is measured by the terms that cancel.
    query, key, value = (t.detach().double() for t in given)
    sizes = [grad_scores.abs() @ key.abs(), grad_scores.abs().mT @ query.abs()]
    sizes = [dim**-0.5 * terms.max().item() for terms in sizes]
    if frames == 1 and cotangents[0] is not None:
        longest = [t.norm(dim=-1).max().item() for t in (query, key, value, cotangents[0].double())]
        sizes = [dim**-0.5 * longest[3] * longest[2] * max(longest[:2])] * 2
    threes = zip(grads, stock_grads, exact_grads, [*sizes, 0.0], strict=False)
    for mine, plain, right, size in threes:
        if mine is not None:
            assert_as_exact_as(mine, plain, right, 2.0, depth=depth, size=size)
    # One number, or one matrix, for all positions and heads. Kernels take these gradients in float32 whatever the
    # inputs.
    if any(mine is not None for mine in grads[3:]):
        _, _, stock_terms, _ = _gradients(torch.float32, *call, True)
        for mine, plain, right in zip(grads[3:], stock_terms, exact_terms, strict=True):
            if mine is not None:
                assert_sum_as_exact_as(mine, plain, right)
