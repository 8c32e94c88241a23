"""Min-max path flow against what people use today: Vico's broadcast form, and what torch.compile makes of it.

Every arm computes T₂ ⊙ (T₁ ⊙ X) at all positions, averaged residual, and its gradient in X and both hops; where hops
come first, (T₂ ⊙ T₁) ⊙ X, as Vico's released code does:

* eager: the definition, which broadcasts to [positions, F, F, K], as the released code does too;
* compiled: torch.compile of the same.

`scores` is what guidance asks for: token_peaks(path_flow(…)), whose gradient reaches few positions. On a GPU ours is
timed as it is called, and as a CUDA graph, where no Python is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cvg_kernels.bench.harness import OURS, assert_agreement, extra_bytes, seconds_by_kind
from cvg_kernels.ops import path_flow, token_peaks
from cvg_kernels.reference import path_flow as flow_reference
from cvg_kernels.reference import token_peaks as peaks_reference

KIND, ROUNDS = "layers", {"cpu": 5, "gpu": 50}
FORMS: dict[str, dict[str, Any]] = {
    "hard": {},
    "soft": {"temperature": 0.01},
    "soft, hops first": {"temperature": 0.01, "order": "hops_first"},
}
#: Broadcast tensors of [positions, F, F, max(F, K)] that the eager arm holds at its peak: forward, and with the
#: gradient.
_EAGER_COPIES = {"hard": (1.2, 5), "soft": (4, 8), "soft, hops first": (4, 8)}


class Shape(NamedTuple):
    """The attention of one layer: an image of height × width positions, frames, text tokens."""

    name: str
    height: int
    width: int
    frames: int
    tokens: int

    @property
    def positions(self) -> int:
        """Of a frame."""
        return self.height * self.width

    @property
    def broadcast_bytes(self) -> int:
        """Of the largest product, every pair of edges written out."""
        return 4 * self.positions * self.frames**2 * max(self.frames, self.tokens)


SHAPES = (
    Shape("VideoCrafter2 10×16", 10, 16, 16, 77),
    Shape("VideoCrafter2 40×64", 40, 64, 16, 77),
    Shape("Wan 480p", 30, 52, 21, 512),
    Shape("VideoCrafter2 40×64, 64 frames", 40, 64, 64, 77),
)
QUICK_SHAPES = (Shape("quick", 3, 5, 4, 6),)


def arms() -> dict[str, tuple[Callable, Callable]]:
    """Flow and scores of every arm, ours last."""
    compiled = torch.compile(flow_reference.path_flow), torch.compile(peaks_reference.token_peaks)
    return {
        "eager": (flow_reference.path_flow, peaks_reference.token_peaks),
        "compiled": compiled,
        OURS: (path_flow, token_peaks),
    }


def cases(device: torch.device, quick: bool) -> list[tuple[Shape, str]]:
    """Every layer in every form."""
    return [(shape, form) for shape in (QUICK_SHAPES if quick else SHAPES) for form in FORMS]


def measure(case: tuple[Shape, str], device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times and memory of every arm on one layer, in one form.

    Captured maps are float32 whatever a model computes in, so `dtype` does not count.

    Raises:
        AssertionError: if an arm does not compute what ours computes.
    """
    shape, form = case
    torch.compiler.reset()
    cross = torch.rand(1, shape.tokens, shape.frames, shape.positions, device=device)
    temporal = [
        torch.randn(1, shape.positions, shape.frames, shape.frames, device=device).softmax(-1) for _ in range(2)
    ]
    leaves = [tensor.clone().requires_grad_() for tensor in (cross, *temporal)]
    grad = torch.randn_like(cross)
    room = _memory(device)
    result: dict[str, Any] = {"shape": shape._asdict(), "form": form, "output_bytes": 4 * grad.numel()}

    def guarded(name: str, what: str, call: Callable[[], Any]) -> Callable[[], Any]:
        needed = _EAGER_COPIES[form][what != "forward"] * shape.broadcast_bytes
        if name != OURS and needed > room:

            def refuse():
                raise RuntimeError(f"would need about {needed / 1e9:.0f} GB")

            return refuse
        return call

    calls: dict[str, dict[str, Callable]] = {"forward": {}, "forward_backward": {}, "scores": {}}
    for name, (flow_of, peaks_of) in arms().items():

        def forward(flow_of=flow_of):
            with torch.no_grad():
                return (flow_of(cross, temporal, **FORMS[form]),)

        def both(flow_of=flow_of):
            flow = flow_of(leaves[0], leaves[1:], **FORMS[form])
            return torch.autograd.grad(flow, leaves, grad)

        def scores(flow_of=flow_of, peaks_of=peaks_of):
            flow = flow_of(leaves[0], leaves[1:], **FORMS[form])
            peaks = peaks_of(flow.unflatten(-1, (shape.height, shape.width)))
            return torch.autograd.grad(peaks.sum(), leaves)

        calls["forward"][name] = guarded(name, "forward", forward)
        calls["forward_backward"][name] = guarded(name, "forward_backward", both)
        calls["scores"][name] = guarded(name, "scores", scores)
    assert_agreement(calls["forward"], 1e-5)
    result |= seconds_by_kind(calls, device, rounds, in_graphs=lambda name: name == OURS)
    result["forward_extra_bytes"] = extra_bytes(calls["forward"][OURS], device)
    return result


def _memory(device: torch.device) -> float:
    """Bytes that may be used."""
    if device.type == "cuda":
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    told = Path("/proc/meminfo")
    for line in told.read_text().splitlines() if told.exists() else ():
        if line.startswith("MemAvailable"):
            return 0.8 * 1024 * int(line.split()[1])
    return float("inf")


def show(layer: dict[str, Any], report: dict[str, Any]) -> None:
    """Prints one layer's arms."""
    shape = Shape(**layer["shape"])
    size = f"[{shape.positions}, {shape.frames}, {shape.frames}]·{shape.tokens}"
    print(f"{shape.name}  {size} tokens, {layer['form']}")
    print(f"  {'':12}  {'forward':>10}  {'+ backward':>10}  {'scores and gradient':>19}")
    kinds = ("forward", "forward_backward", "scores")
    rows = [(name, [layer[what][name] for what in kinds]) for name in layer["forward"]]
    if "forward_graph" in layer:
        rows.append(("CUDA graph", [layer[f"{what}_graph"][OURS] for what in kinds]))
    for name, times in rows:
        cells = [took if isinstance(took, str) else f"{took * 1e3:.2f} ms" for took in times]
        print(f"  {name:12}  {cells[0]:>10}  {cells[1]:>10}  {cells[2]:>19}")
    if layer["forward_extra_bytes"] is not None:
        share = layer["forward_extra_bytes"] / layer["output_bytes"]
        print(f"  extra memory of ours, forward: {share:.2f} of the output")
