"""Fair timing: all arms in turn, round after round, in one process; medians; memory beyond the inputs."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cvg_kernels.backends import OPERATIONS, Backend, unavailable_reason
from cvg_kernels.kernels import TRITON_BACKENDS

#: Our arm, as `auto` chooses.
OURS = "cvg_kernels"
Arm = Callable[[], Any]
_L2_FLUSH_BYTES = 256 * 2**20
_GPU_SECONDS = 10.0
_FAILURES = (RuntimeError, ValueError, NotImplementedError)  # of an arm, out of memory among them


def forward(arm: Callable, inputs: tuple) -> Arm:
    """The call of an arm without gradients."""

    def call():
        with torch.no_grad():
            return arm(*inputs)

    return call


def forward_backward(arm: Callable, inputs: tuple, needed: tuple[int, ...] = (0,)) -> Arm:
    """Forward and backward, to the query alone, as guidance does; `needed` names other inputs."""
    leaves = [
        t.detach().requires_grad_(index in needed) if t.is_floating_point() else t for index, t in enumerate(inputs)
    ]

    def call():
        outputs = arm(*leaves)
        wrt = [leaves[index] for index in needed]
        return torch.autograd.grad(outputs, wrt, [torch.ones_like(out) for out in outputs])

    return call


def passes(arms: Mapping[str, Callable], inputs: tuple, needed: tuple[int, ...] = (0,)) -> dict[str, dict[str, Arm]]:
    """The calls of every arm, by what is timed: "forward", and "forward_backward" to the inputs `needed`."""
    return {
        "forward": {name: forward(arm, inputs) for name, arm in arms.items()},
        "forward_backward": {name: forward_backward(arm, inputs, needed) for name, arm in arms.items()},
    }


def as_layers_have_it(
    batch: int, heads: int, tokens: int, dim: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Random `[B, H, N, D]` in memory as diffusers' layers give it to attention: a view of `[B, N, H, D]`."""
    return torch.randn(batch, tokens, heads, dim, device=device).to(dtype).transpose(1, 2)


def as_layers_take_it(out: torch.Tensor) -> torch.Tensor:
    """What diffusers' layers make of an output `[B, H, N, D]` before the next projection: `[B, N, H·D]`, a copy or
    none.
    """
    return out.transpose(1, 2).flatten(2)


def arms_by_backend(
    operation: str, by: Callable[[str], Callable], device: torch.device, dtype: torch.dtype
) -> dict[str, Callable]:
    """Ours by every backend that runs here at full speed, and last, by the name `cvg_kernels` alone, as `auto`
    chooses.

    Args:
        operation: its name in the table of kernels.
        by: the name of a backend → arm.
        device: device of the inputs.
        dtype: dtype of the inputs.
    """
    arms = {}
    for backend in OPERATIONS[operation]:
        interpreted = backend in TRITON_BACKENDS and device.type == "cpu"
        usable = unavailable_reason(operation, backend, device, dtype) is None
        if usable and not interpreted and backend is not Backend.REFERENCE:
            arms[f"{OURS} {backend.value}"] = by(backend.value)
    return arms | {OURS: by(Backend.AUTO.value)}


def graphed(arm: Arm) -> Arm:
    """An arm as a CUDA graph: its replay costs no Python, so its time is that of the GPU alone.

    Raises:
        RuntimeError: if the arm waits for the GPU or copies from the host's memory; such an arm cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and fills caches
            arm()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = arm()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def graphed_where_possible(arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """The arms as CUDA graphs; one that cannot be captured raises its error when it is called."""
    torch.cuda.empty_cache()  # what other calls left is of no use to a graph
    found = {}
    for name, arm in arms.items():
        try:
            found[name] = graphed(arm)
        except _FAILURES as error:

            def refuse(error=error):
                raise error

            found[name] = refuse
    return found


def seconds_by_kind(
    calls: Mapping[str, Mapping[str, Arm]],
    device: torch.device,
    rounds: int,
    *,
    in_graphs: Callable[[str], bool] = lambda arm: True,
) -> dict[str, dict[str, Any]]:
    """Times the arms of every kind of call; on a GPU also as CUDA graphs, under `<kind>_graph`.

    Args:
        calls: kind → arms, as `passes` returns them.
        device: where they run.
        rounds: as for `median_seconds`.
        in_graphs: whether an arm is timed as a graph too, by its name.
    """
    found = {}
    for kind, arms in calls.items():
        found[kind] = median_seconds(arms, device, rounds)
        if device.type == "cuda":
            graphed = graphed_where_possible({n: arm for n, arm in arms.items() if in_graphs(n)})
            found[f"{kind}_graph"] = median_seconds(graphed, device, rounds)
    return found


def _time_cpu(arm: Arm) -> float:
    began = time.perf_counter()
    arm()
    return time.perf_counter() - began


def _time_gpu(arm: Arm, flush: torch.Tensor) -> float:
    """Seconds between two events, with a cold L2 cache."""
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    arm()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def median_seconds(arms: Mapping[str, Arm], device: torch.device, rounds: int) -> dict[str, float | str]:
    """Median seconds of each arm, interleaved; an arm that fails has its error instead.

    Args:
        arms: name → what is timed.
        device: where it runs.
        rounds: timed rounds, after two that are not; on a GPU at least five, and no further one after ten seconds.
    """
    end = time.perf_counter() + (_GPU_SECONDS if device.type == "cuda" else float("inf"))
    flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    errors: dict[str, str] = {}
    for round_ in range(rounds + 2):
        if round_ >= 7 and time.perf_counter() > end:
            break
        for name, arm in arms.items():
            if name in errors:
                continue
            try:
                took = _time_cpu(arm) if flush is None else _time_gpu(arm, flush)
            except _FAILURES as error:
                errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                continue
            if round_ >= 2:
                seconds[name].append(took)
    return {name: errors.get(name) or statistics.median(seconds[name]) for name in arms}


def assert_agreement(arms: Mapping[str, Arm], tolerance: float) -> None:
    """Asserts that every arm that runs computes what the last one does: a wrong result is not timed.

    Args:
        arms: name → call that returns tensors, of which those that an arm has are compared.
        tolerance: tolerance of the largest difference, relative to the largest number.
    """
    *rivals, (_, ours) = arms.items()
    wanted = [tensor.float() for tensor in ours()]
    for name, rival in rivals:
        try:
            found = rival()
        except _FAILURES:
            continue  # reported where it is timed
        for have, want in zip(found, wanted, strict=False):
            error = ((have.float() - want).abs().max() / want.abs().max()).item()
            assert error < tolerance, f"{name} differs by {error:.2g}"


def extra_bytes(arm: Arm, device: torch.device) -> int | None:
    """Peak memory of one call beyond what is allocated before it, results included; `None` where it cannot be told."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = arm()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    try:
        _return_freed_memory()  # else a call is served from what earlier ones left, and seems to need nothing
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        kept = arm()
        del kept
        return _status("VmHWM") - before
    except OSError:
        return None


def _return_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What a large matrix product reaches here: the yardstick for "percent of peak"."""
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    took = median_seconds({"mm": lambda: a @ a}, device, rounds=5)["mm"]
    return 2 * size**3 / took if isinstance(took, float) else float("nan")


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what a result was measured."""
    from cvg_kernels.environment import devices, versions

    return {
        "date": datetime.date.today().isoformat(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "devices": devices(),
        "versions": versions(),
    }
