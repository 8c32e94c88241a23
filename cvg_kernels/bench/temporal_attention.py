"""Temporal attention with VSTAR's band against what people use today, on layers of real models.

Query, key and value lie as the layers' projections leave them, `[P, F, H, D]` seen as `[P, H, F, D]`, and every arm
makes of its output what the next projection takes, `[P, F, H·D]`; its backward pass goes to query, key and value:

* eager VSTAR: logits, the band scaled by the rows' maxima, softmax, product with v, each in full, as its code does;
* sdpa+mask: stock attention with a dense mask that holds the band scaled by the rows' maxima, made eagerly;
* cvg_kernels and a backend: ours by that backend; cvg_kernels alone is as `auto` chooses.

`sdpa without band` computes less: no band at all. It is the floor that the fused band is measured against. On a GPU
every arm is timed as it is called, and as a CUDA graph, where no Python is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from cvg_kernels.bench.harness import (
    arms_by_backend,
    as_layers_have_it,
    as_layers_take_it,
    assert_agreement,
    passes,
    seconds_by_kind,
)
from cvg_kernels.ops import temporal_attention

KIND, ROUNDS = "layers", {"cpu": 7, "gpu": 50}
SIGMA = 4.0
FLOOR = "sdpa without band"


class Shape(NamedTuple):
    """A layer: positions, heads, frames, head dimension."""

    name: str
    positions: int
    heads: int
    frames: int
    dim: int

    @property
    def flops(self) -> int:
        """Of the forward pass: two products."""
        return 4 * self.positions * self.heads * self.frames**2 * self.dim

    def bytes(self, element_size: int) -> int:
        """What the forward pass must at least move: q, k, v and out."""
        return 4 * self.positions * self.heads * self.frames * self.dim * element_size


SHAPES = (
    Shape("VideoCrafter2 width 64", 2560, 5, 16, 64),
    Shape("VideoCrafter2 width 64", 2560, 5, 64, 64),
    Shape("VideoCrafter2 width 32", 640, 10, 16, 64),
    Shape("VideoCrafter2 width 32", 640, 10, 64, 64),
    Shape("AnimateDiff 64×64", 4096, 8, 16, 40),
)
GPU_SHAPES = (  # 524 288 sequences: more than the 65 535 blocks that some kernels can have
    Shape("AnimateDiff 256×256", 65_536, 8, 16, 40),
)
QUICK_SHAPES = (Shape("quick", 24, 2, 16, 16), Shape("quick", 6, 2, 40, 24))


def band(q: torch.Tensor) -> torch.Tensor:
    """G, which the rivals' users would make once."""
    frame = torch.arange(q.shape[2], device=q.device, dtype=q.dtype)
    return (-(frame[:, None] - frame[None]).square() / (2 * SIGMA**2)).exp()


def ours_by(backend: str) -> Callable:
    """temporal_attention by one backend."""

    def ours(q, k, v, g):
        out = temporal_attention(q, k, v, sigma=SIGMA, backend=backend).out
        return (as_layers_take_it(out),)

    return ours


def eager(q, k, v, g):
    """Every step in full."""
    s = torch.einsum("phid,phjd->phij", q, k) * q.shape[-1] ** -0.5
    s = s + s.max(-1, keepdim=True).values * g
    return (as_layers_take_it(torch.einsum("phij,phjd->phid", s.softmax(-1), v)),)


def sdpa_and_mask(q, k, v, g):
    """Stock attention, the band as its mask."""
    s = torch.einsum("phid,phjd->phij", q, k) * q.shape[-1] ** -0.5
    mask = s.max(-1, keepdim=True).values * g
    return (as_layers_take_it(scaled_dot_product_attention(q, k, v, attn_mask=mask)),)


def sdpa_alone(q, k, v, g):
    """No band: the floor."""
    return (as_layers_take_it(scaled_dot_product_attention(q, k, v)),)


RIVALS: dict[str, Callable] = {FLOOR: sdpa_alone, "eager VSTAR": eager, "sdpa+mask": sdpa_and_mask}


def cases(device: torch.device, quick: bool) -> tuple[Shape, ...]:
    """The layers."""
    if quick:
        return QUICK_SHAPES
    return SHAPES + GPU_SHAPES if device.type == "cuda" else SHAPES


def measure(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times of every arm on one layer.

    Raises:
        AssertionError: if an arm does not compute what ours computes: a wrong result is not timed.
    """
    p, h, f, d = shape[1:]
    q, k, v = (as_layers_have_it(p, h, f, d, device, dtype) for _ in range(3))
    inputs = (q, k, v, band(q))
    arms = RIVALS | arms_by_backend("temporal_attention", ours_by, device, dtype)
    calls = passes(arms, inputs, (0, 1, 2))
    banded = {name: call for name, call in calls["forward"].items() if name != FLOOR}
    assert_agreement(banded, 2e-4 if dtype == torch.float32 else 3e-2)
    result: dict[str, Any] = {
        "shape": shape._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "flops": shape.flops,
        "bytes": shape.bytes(q.element_size()),
    }
    return result | seconds_by_kind(calls, device, rounds)


def show(layer: dict[str, Any], report: dict[str, Any]) -> None:
    """Prints one layer's arms; GB/s counts q, k, v and out once."""
    shape = Shape(**layer["shape"])
    p, h, f, d = shape[1:]
    print(f"{shape.name}  [{p}, {h}, {f}, {d}] {layer['dtype']}, σ = {SIGMA:g}")
    print(f"  {'':18}  {'forward':>11}  {'GB/s':>6}  {'GFLOP/s':>8}  {'+ backward to q, k, v':>22}")
    for name in layer["forward"]:
        took, both = layer["forward"][name], layer["forward_backward"][name]
        if isinstance(took, str):
            print(f"  {name:18}  {took}")
            continue
        later = both if isinstance(both, str) else f"{both * 1e3:.2f} ms"
        print(
            f"  {name:18}  {took * 1e3:8.2f} ms  {layer['bytes'] / took / 1e9:6.1f}  "
            f"{layer['flops'] / took / 1e9:8.0f}  {later:>22}"
        )
        graphs = [layer.get(f"{kind}_graph", {}).get(name) for kind in ("forward", "forward_backward")]
        if all(isinstance(each, float) for each in graphs):
            print(f"  {'':18}  as CUDA graphs {' and '.join(f'{each * 1e3:.2f} ms' for each in graphs)}")
