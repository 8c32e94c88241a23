"""What the Triton launchers of path flow decide: in which order in memory the kernels read, and what is copied for
that.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from cvg_kernels._triton import path_flow  # noqa: E402
from cvg_kernels._triton.path_flow_kernels import hop_kernel, turn_kernel  # noqa: E402
from cvg_kernels.reference import path_flow as reference  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", [(2, 5, 7, 37), (1, 21, 21, 40), (3, 4, 2, 3)], ids=str)
@pytest.mark.parametrize("order", [(0, 3, 1, 2), (3, 2, 1, 0), (1, 0, 3, 2)], ids=str)
def test_positions_are_turned_innermost(shape, order):
    """Whatever lies innermost before: the same numbers, contiguous."""
    back = sorted(range(4), key=order.__getitem__)
    given = torch.randn([shape[axis] for axis in order], device=DEVICE).permute(back)
    turned, (launch,) = path_flow._positions_innermost(given)
    assert launch.kernel is turn_kernel and turned.is_contiguous()
    launch.run()
    assert torch.equal(turned, given)


def test_what_lies_well_is_not_copied():
    given = torch.randn(2, 3, 4, 18, device=DEVICE)
    for fine in (given, given[..., :1], given.mT.contiguous().mT[:, :, :, :1], given[..., ::3][..., :1]):
        assert path_flow._positions_innermost(fine) == (fine, [])
    alike = given[..., :1].expand(-1, -1, -1, 9)
    assert path_flow._positions_innermost(alike) == (alike, [])


@pytest.mark.parametrize("temperature", [None, 0.01])
def test_every_kernel_reads_along_the_positions(temperature):
    """The hops of attention, `[B, L, F, F]`, and tokens and gradients with any strides: each is turned once a call."""
    cross = torch.rand(1, 18, 5, 9, device=DEVICE).permute(0, 3, 2, 1)
    hops = [torch.rand(1, 18, 5, 5, device=DEVICE).softmax(-1) for _ in range(2)]
    grad = torch.randn(1, 18, 5, 9, device=DEVICE).permute(0, 3, 2, 1)
    forward, flows, turned = path_flow.forward_launches(cross, hops, temperature, "average")
    kernels = [launch.kernel for launch in forward]
    assert kernels == [turn_kernel, turn_kernel, hop_kernel, turn_kernel, hop_kernel]
    backward, grad_cross, grad_hops = path_flow.backward_launches(
        grad, flows, turned, temperature, "average", [True, False]
    )
    assert [launch.kernel for launch in backward].count(turn_kernel) == 1
    for launch in (*forward, *backward):
        launch.run()
        if launch.kernel is not turn_kernel:
            inner = {name: launch.arguments[name] for name in ("hop_l", "x_l", "y_l")}
            assert set(inner.values()) == {1}, inner
            assert launch.arguments.get("g_l", 1) == 1

    leaves = [tensor.double().requires_grad_() for tensor in (cross, *hops)]
    wanted = reference.path_flow(leaves[0], leaves[1:], temperature=temperature)
    exact = torch.autograd.grad(wanted, leaves, grad.double())
    for have, want in zip((flows[-1], grad_cross, grad_hops[0]), (wanted, *exact[:2]), strict=True):
        torch.testing.assert_close(have.double(), want, rtol=1e-3, atol=1e-4)
    assert grad_hops[1] is None and grad_hops[0].is_contiguous()
