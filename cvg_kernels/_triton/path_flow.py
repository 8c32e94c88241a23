"""Launchers of min-max path flow: they allocate, choose tiles, and launch a kernel for each hop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from cvg_kernels._triton.launch import Launch
from cvg_kernels._triton.path_flow_kernels import (
    flow_gradient_kernel,
    hop_gradient_kernel,
    hop_kernel,
    ties_kernel,
    turn_kernel,
)

#: residual → (hop_weight, skip_weight)
_MIXING = {"average": (0.5, 0.5), "add": (1.0, 1.0), None: (1.0, 0.0)}
_POSITIONS, _MIDDLE, _ELEMENTS = 32, 8, 2048  # of a tile: positions, tokens at most, all of it


@dataclass(frozen=True)
class Hop:
    """One hop, y = edge ⊙ x: `hop [B, L, rows, depth]`, `x [B, K, depth, L]`, with any strides."""

    hop: torch.Tensor
    x: torch.Tensor
    hop_weight: float
    skip_weight: float
    temperature: float | None

    def _launch(self, kernel, rows: int, middle: int, tensors: dict, strides: dict) -> Launch:
        """A launch over tiles of `rows` × `middle` × positions."""
        batch, positions, all_rows, depth = self.hop.shape
        positions_tile = min(_POSITIONS, triton.next_power_of_2(positions))
        middle_tile = min(_MIDDLE, triton.next_power_of_2(middle))
        rows_tile = min(_ELEMENTS // (positions_tile * middle_tile), triton.next_power_of_2(rows), 64)
        if kernel is hop_kernel and triton.cdiv(rows, rows_tile) % 2 == 0:
            rows_tile *= 2  # it holds so few numbers that twice the rows, none in vain, leave registers for many warps
        arguments = {
            **tensors, "hop": self.hop, "x": self.x,
            **_strides("hop", "blir", self.hop), **_strides("x", "bkrl", self.x), **strides,
            "tokens": self.x.shape[1], "rows": all_rows, "depth": depth, "positions": positions,
            "hop_weight": self.hop_weight, "skip_weight": self.skip_weight,
            "temperature": float(self.temperature or 1.0),
        }  # fmt: skip
        constants = {
            "SOFT": self.temperature is not None, "ROWS": rows_tile, "TOKENS": middle_tile, "DEPTH": middle_tile,
            "POSITIONS": positions_tile,
        }  # fmt: skip
        names = set(kernel.arg_names)
        grid = (
            batch * triton.cdiv(positions, positions_tile),
            triton.cdiv(middle, middle_tile),
            triton.cdiv(rows, rows_tile),
        )
        return Launch(
            kernel,
            grid,
            {name: value for name, value in arguments.items() if name in names},
            {name: value for name, value in constants.items() if name in names},
            num_warps=4,
            num_stages=2,
        )

    def forward(self, y: torch.Tensor) -> Launch:
        """Fills y `[B, K, rows, L]`."""
        return self._launch(hop_kernel, self.hop.shape[2], self.x.shape[1], {"y": y}, _strides("y", "bkil", y))

    def ties(self, y: torch.Tensor, grad: torch.Tensor, shared: torch.Tensor) -> Launch:
        """Fills `shared`, laid out as y: the gradient that each of the tying paths gets."""
        return self._launch(
            ties_kernel, self.hop.shape[2], self.x.shape[1], {"y": y, "grad": grad, "shared": shared},
            _strides("y", "bkil", y) | _strides("g", "bkil", grad),
        )  # fmt: skip

    def flow_gradient(self, y: torch.Tensor, grad: torch.Tensor, grad_x: torch.Tensor) -> Launch:
        """Fills the gradient of x."""
        return self._launch(
            flow_gradient_kernel, self.hop.shape[3], self.x.shape[1], {"y": y, "grad": grad, "grad_x": grad_x},
            _strides("y", "bkil", y) | _strides("g", "bkil", grad) | _strides("d", "bkrl", grad_x),
        )  # fmt: skip

    def hop_gradient(self, y: torch.Tensor, grad: torch.Tensor, grad_hop: torch.Tensor) -> Launch:
        """Fills the gradient of hop."""
        return self._launch(
            hop_gradient_kernel, self.hop.shape[2], self.hop.shape[3],
            {"y": y, "grad": grad, "grad_hop": grad_hop},
            _strides("y", "bkil", y) | _strides("g", "bkil", grad) | _strides("d", "blir", grad_hop),
        )  # fmt: skip

    def shared_gradient(self, y: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, list[Launch]]:
        """The gradient of y as one path has it, and the launch that fills it: the soft form knows no ties."""
        if self.temperature is not None:
            return grad, []
        shared = torch.empty_like(y)
        return shared, [self.ties(y, grad, shared)]


def _strides(name: str, axes: str, tensor: torch.Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": step for axis, step in zip(axes, tensor.stride(), strict=True)}


def _positions_innermost(tensor: torch.Tensor) -> tuple[torch.Tensor, list[Launch]]:
    """The same numbers `[B, X, Y, L]` with neighbouring positions next to each other, and the launch that copies them.

    A tensor that has them so, or one number for all of them, is left as it is.
    """
    batch, rows, depth, positions = tensor.shape
    if positions == 1 or tensor.stride(3) in (0, 1):
        return tensor, []
    turned = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    tile = {"ROWS": 4, "DEPTH": min(16, triton.next_power_of_2(depth)), "POSITIONS": _POSITIONS}
    arguments = {
        "given": tensor, "turned": turned, **_strides("given", "birl", tensor),
        "rows": rows, "depth": depth, "positions": positions,
    }  # fmt: skip
    grid = (
        batch * triton.cdiv(positions, tile["POSITIONS"]),
        triton.cdiv(depth, tile["DEPTH"]),
        triton.cdiv(rows, tile["ROWS"]),
    )
    return turned, [Launch(turn_kernel, grid, arguments, tile, num_warps=4, num_stages=1)]


def forward_launches(cross, temporal, temperature, residual):
    """The launches of all hops, the flow before the first and after each, and the hops as the kernels read them."""
    cross, launches = _positions_innermost(cross)
    flows, hops = [cross], []
    for hop in temporal:
        hop, turn = _positions_innermost(hop.permute(0, 2, 3, 1))
        hops.append(hop.permute(0, 3, 1, 2))
        flows.append(torch.empty_like(cross, memory_format=torch.contiguous_format))
        launches += turn
        launches.append(Hop(hops[-1], flows[-2], *_MIXING[residual], temperature).forward(flows[-1]))
    return launches, flows, hops


def backward_launches(grad, flows, hops, temperature, residual, need_temporal):
    """The launches of the gradient, last hop first, and the gradients of cross and of the hops.

    Args:
        grad: grad of the last flow.
        flows: as `forward_launches` returns them.
        hops: as `forward_launches` returns them.
        temperature: `None` for the hard form.
        residual: how the skip connection enters a hop.
        need_temporal: of which hops a gradient is wanted.
    """
    grad, launches = _positions_innermost(grad)
    grad_temporal = [None] * len(hops)
    for index in reversed(range(len(hops))):
        hop = Hop(hops[index], flows[index], *_MIXING[residual], temperature)
        shared, ties = hop.shared_gradient(flows[index + 1], grad)
        launches += ties
        if need_temporal[index]:
            grad_temporal[index] = torch.empty_like(hops[index], memory_format=torch.contiguous_format)
            launches.append(hop.hop_gradient(flows[index + 1], shared, grad_temporal[index]))
        grad = torch.empty_like(flows[index], memory_format=torch.contiguous_format)
        launches.append(hop.flow_gradient(flows[index + 1], shared, grad))
    return launches, grad, grad_temporal


def forward(cross, temporal, temperature, residual):
    """See `cvg_kernels.reference.path_flow`."""
    if not temporal:
        return cross.clone(memory_format=torch.contiguous_format)
    launches, flows, _ = forward_launches(cross, temporal, temperature, residual)
    for launch in launches:
        launch.run()
    return flows[-1]


def backward(grad, cross, temporal, temperature, residual, need_temporal):
    """The gradient of cross, and that of each hop or `None`; the flow between the hops is computed once more."""
    if not temporal:
        return grad.clone(memory_format=torch.contiguous_format), []
    forward, flows, hops = forward_launches(cross, temporal, temperature, residual)
    backward, grad_cross, grad_temporal = backward_launches(grad, flows, hops, temperature, residual, need_temporal)
    for launch in (*forward, *backward):
        launch.run()
    return grad_cross, grad_temporal
