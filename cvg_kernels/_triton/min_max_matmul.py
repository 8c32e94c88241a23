"""Launchers of the min-max product, which the kernels of path flow compute: a hop of one token."""

from __future__ import annotations

import torch

from cvg_kernels._triton.path_flow import Hop


def _product(a: torch.Tensor, b: torch.Tensor, temperature: float | None) -> Hop:
    """A ⊙ B as a hop: one token, the columns as positions, the same edges at each."""
    edges = a[:, None].expand(-1, b.shape[2], -1, -1)  # [B, Y, X, R]
    return Hop(edges, b[:, None], 1.0, 0.0, temperature)


def forward(a, b, temperature):
    """See `cvg_kernels.reference.min_max_matmul`."""
    c = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    _product(a, b, temperature).forward(c[:, None]).run()
    return c


def backward(grad, a, b, temperature, need_a, need_b):
    """The gradients of a and b, `None` where not needed; that of a is that of the second factor of Cᵀ = Bᵀ ⊙ Aᵀ."""
    c = forward(a, b, temperature)
    grads = [None, None]
    for factor, needed in ((0, need_a), (1, need_b)):
        if not needed:
            continue
        turn = (lambda t: t.mT) if factor == 0 else (lambda t: t)
        factors = (b.mT, a.mT) if factor == 0 else (a, b)
        hop = _product(*factors, temperature)
        shared, launches = hop.shared_gradient(turn(c)[:, None], turn(grad)[:, None])
        grads[factor] = torch.empty_like((a, b)[factor], memory_format=torch.contiguous_format)
        launches.append(hop.flow_gradient(turn(c)[:, None], shared, turn(grads[factor])[:, None]))
        for launch in launches:
            launch.run()
    return grads
