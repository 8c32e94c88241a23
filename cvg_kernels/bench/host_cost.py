"""What one call costs on the host: the Python and the dispatching, as a multiple of what stock attention takes.

Measured on layers so small that the work itself is nothing beside it, in CPU time of this process, one thread, all
arms in turn. On a GPU a call is over when it is launched; the launches are waited for between the clocks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

_CALLS, _ROUNDS = 50, 21


def seconds_per_call(
    arms: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = _ROUNDS
) -> dict[str, float]:
    """Median CPU seconds of one call of each arm.

    Args:
        arms: name → call.
        device: where the calls run.
        rounds: rounds of all arms in turn, after one that is not timed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {name: [] for name in arms}
    try:
        for round_ in range(rounds + 1):
            for name, arm in arms.items():
                began = time.process_time()
                for _ in range(_CALLS):
                    arm()
                took = time.process_time() - began
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if round_:
                    taken[name].append(took / _CALLS)
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(each) for name, each in taken.items()}


def python_cost(
    ours: Callable[..., torch.Tensor],
    stock: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    device: torch.device,
    rounds: int = _ROUNDS,
) -> dict[str, dict[str, float]]:
    """CPU seconds of a call of ours and of stock's, without gradients, with a graph for them, and with the backward
    pass.

    Args:
        ours: function of the inputs that gives one tensor.
        stock: another function of the same inputs.
        inputs: the first of them gets the gradient.
        device: where they lie.
        rounds: as for `seconds_per_call`.

    Returns:
        `{"forward": {"ours": …, "stock": …, "ratio": …}, "forward with gradients": …, "forward + backward": …}`.
    """
    leaf = inputs[0].detach().requires_grad_()
    grads = {arm: torch.ones_like(arm(*inputs)) for arm in (ours, stock)}

    def forward(arm):
        with torch.no_grad():
            return arm(*inputs)

    def with_gradients(arm):
        return arm(leaf, *inputs[1:])

    def both(arm):
        return torch.autograd.grad(arm(leaf, *inputs[1:]), leaf, grads[arm])

    found = {}
    kinds = {"forward": forward, "forward with gradients": with_gradients, "forward + backward": both}
    for kind, call in kinds.items():
        arms = {"ours": lambda call=call: call(ours), "stock": lambda call=call: call(stock)}
        seconds = seconds_per_call(arms, device, rounds)
        found[kind] = seconds | {"ratio": seconds["ours"] / seconds["stock"]}
    return found


def show(cost: Mapping[str, Mapping[str, float]]) -> None:
    """Prints one line a kind."""
    for kind, figures in cost.items():
        print(
            f"Python cost per call, {kind}: ours ×{figures['ratio']:.1f} of stock's "
            f"({figures['ours'] * 1e6:.0f} µs against {figures['stock'] * 1e6:.0f} µs)"
        )
