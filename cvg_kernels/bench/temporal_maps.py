"""Maps between the frames of a video against what a user could write, on layers of real models.

Query and key lie as the layers' projections leave them, `[B, N, H, D]` seen as `[B, H, N, D]`, the video behind a text
where the model has one, and the log-sum-exp of the main attention is known. The backward pass goes to query, key and
log-sum-exp:

* eager: the video's tokens by place, the logits of the same places by a product of matrices, exp and mean over the
  heads;
* einsum: the same in one einsum on the grid, without copies of ours;
* cvg_kernels and a backend: ours by that backend; cvg_kernels alone is as `auto` chooses.

`read q and k` computes less, a sum of all numbers: it is the floor of what must be moved. The report also predicts:
the larger of the bytes at the speed of the floor and the operations at that of a large matrix product. What the maps
would cost by way of the whole matrix, (F · h · w)² logits, no machine here could hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from cvg_kernels.bench.harness import (
    OURS,
    arms_by_backend,
    as_layers_have_it,
    assert_agreement,
    passes,
    seconds_by_kind,
)
from cvg_kernels.ops import temporal_maps

KIND, ROUNDS = "layers", {"cpu": 7, "gpu": 50}
FLOOR = "read q and k"


class Shape(NamedTuple):
    """A layer: batch, heads, frames, rows, columns, head dimension, tokens of a text before the video."""

    name: str
    batch: int
    heads: int
    frames: int
    rows: int
    columns: int
    dim: int
    text: int = 0

    @property
    def grid(self) -> tuple[int, int, int]:
        """(F, h, w)."""
        return self.frames, self.rows, self.columns

    @property
    def tokens(self) -> int:
        """Of the sequence."""
        return self.text + self.frames * self.rows * self.columns

    @property
    def flops(self) -> int:
        """Of the forward pass: one product."""
        places = self.rows * self.columns
        return 2 * self.batch * self.heads * places * self.frames**2 * self.dim

    def bytes(self, element_size: int) -> int:
        """What the forward pass must at least move: the video's q, k and log-sum-exp, and the maps."""
        places = self.batch * self.rows * self.columns
        read = places * self.heads * self.frames * (2 * self.dim * element_size + 4)
        return read + places * self.frames**2 * 4


SHAPES = (
    Shape("Wan-1.3B 480p", 1, 12, 21, 30, 52, 128),
    Shape("CogVideoX-2B", 2, 30, 13, 30, 45, 64, 226),
    Shape("LTX 512×704", 1, 32, 21, 16, 22, 64),
)
GPU_SHAPES = (Shape("HunyuanVideo 720p", 1, 24, 33, 45, 80, 128, 256),)
QUICK_SHAPES = (Shape("quick", 1, 2, 5, 3, 4, 16, 3), Shape("quick", 2, 2, 3, 2, 2, 24))


def ours_by(backend: str, shape: Shape) -> Callable:
    """temporal_maps by one backend."""
    starts = {"query_start": shape.text, "key_start": shape.text}

    def ours(q, k, lse):
        return (temporal_maps(q, k, lse, shape.grid, **starts, backend=backend),)

    return ours


def eager_on(shape: Shape) -> Callable:
    """Products of matrices, place by place."""

    def eager(q, k, lse):
        def by_place(tensor):
            video = tensor[:, :, shape.text :].unflatten(2, (shape.frames, -1))
            return video.transpose(2, 3)  # [B, H, P, F, …]

        scores = by_place(q) @ by_place(k).mT * shape.dim**-0.5
        return ((scores.float() - by_place(lse)[..., None]).exp().mean(1),)

    return eager


def einsum_on(shape: Shape) -> Callable:
    """One einsum."""

    def einsum(q, k, lse):
        q, k, lse = (t[:, :, shape.text :].unflatten(2, (shape.frames, -1)) for t in (q, k, lse))
        scores = torch.einsum("bhipd,bhjpd->bhpij", q, k) * shape.dim**-0.5
        return ((scores.float() - lse.mT[..., None]).exp().mean(1),)

    return einsum


def read(q, k, lse):
    """All of query, key and log-sum-exp once, as they lie in memory."""
    return (q.transpose(1, 2).sum(), k.transpose(1, 2).sum(), lse.sum())


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
    size = (shape.batch, shape.heads, shape.tokens, shape.dim)
    q, k = (as_layers_have_it(*size, device, dtype) for _ in range(2))
    lse = torch.rand(size[:3], device=device) + 6.0
    rivals = {FLOOR: read, "eager": eager_on(shape), "einsum": einsum_on(shape)}
    ours = arms_by_backend("temporal_maps", lambda name: ours_by(name, shape), device, dtype)
    calls = passes(rivals | ours, (q, k, lse), (0, 1, 2))
    compared = {name: call for name, call in calls["forward"].items() if name != FLOOR}
    assert_agreement(compared, 2e-4 if dtype == torch.float32 else 3e-2)
    result: dict[str, Any] = {
        "shape": shape._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "flops": shape.flops,
        "bytes": shape.bytes(q.element_size()),
        "floor_bytes": 2 * q.numel() * q.element_size(),
    }
    return result | seconds_by_kind(calls, device, rounds)


def show(layer: dict[str, Any], report: dict[str, Any]) -> None:
    """Prints one layer's arms; GB/s counts what must be moved."""
    shape = Shape(**layer["shape"])
    print(
        f"{shape.name}  [{shape.batch}, {shape.heads}, {shape.text} + {shape.grid}, {shape.dim}] {layer['dtype']}: "
        f"{layer['bytes'] / 1e6:.0f} MB, {layer['flops'] / 1e9:.1f} GFLOP"
    )
    floor = layer["forward"][FLOOR]
    if isinstance(floor, float):
        moved = layer["bytes"] * floor / layer["floor_bytes"]
        computed = layer["flops"] / report["matrix_product_flops"]
        print(
            f"  predicted at least {max(moved, computed) * 1e3:.2f} ms: bytes {moved * 1e3:.2f}, "
            f"operations {computed * 1e3:.2f}"
        )
    for name, took in layer["forward"].items():
        both = layer["forward_backward"][name]
        if isinstance(took, str):
            print(f"  {name:18}  {took}")
            continue
        later = both if isinstance(both, str) else f"{both * 1e3:.2f} ms"
        print(f"  {name:18}  {took * 1e3:8.2f} ms  {layer['bytes'] / took / 1e9:6.1f} GB/s  + backward {later}")
    ours, eager = layer["forward"][OURS], layer["forward"]["eager"]
    if isinstance(ours, float) and isinstance(eager, float):
        print(f"  forward: ×{eager / ours:.1f} of eager")
