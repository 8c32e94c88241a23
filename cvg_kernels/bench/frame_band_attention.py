"""Attention over all tokens of a video with a band by frame distance, against what people could write today.

Query, key and value lie as the layers' projections leave them, `[B, N, H, D]` seen as `[B, H, N, D]`, and every arm
makes of its output what the next projection takes, `[B, N, H·D]`; its backward pass goes to query, key and value:

* eager: logits, the band scaled by the rows' maxima, softmax, product with v, each N×N in full;
* sdpa+mask: stock attention with a dense mask that holds the band scaled by the rows' maxima. Stock attention gives no
  maxima, so the logits are made in full for them, and once more inside;
* cvg_kernels and a backend: ours by that backend; cvg_kernels alone is as `auto` chooses.

`sdpa without band` computes less: no band at all. It is the floor: one pass over the keys, where the band needs two.
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
    extra_bytes,
    median_seconds,
    passes,
)
from cvg_kernels.ops import frame_band_attention

KIND, ROUNDS = "layers", {"cpu": 3, "gpu": 20}
SIGMA = 2.0
FLOOR = "sdpa without band"


class Shape(NamedTuple):
    """A layer: heads, frames, tokens of a frame, tokens of the text (which come first), head dimension."""

    name: str
    heads: int
    frames: int
    positions: int
    text: int
    dim: int

    @property
    def tokens(self) -> int:
        """N."""
        return self.text + self.frames * self.positions

    @property
    def flops(self) -> int:
        """Of a forward pass without band: two products."""
        return 4 * self.heads * self.tokens**2 * self.dim

    def matrix_bytes(self, element_size: int) -> int:
        """Of one N×N matrix for all heads."""
        return self.heads * self.tokens**2 * element_size


#: The layers of Wan-1.3B (12 heads of 128) and CogVideoX-2B (30 heads of 64) on small videos.
SHAPES = (Shape("Wan-1.3B 128×128", 12, 16, 64, 0, 128), Shape("CogVideoX-2B 128×128", 30, 13, 64, 226, 64))
#: On a GPU the layers themselves.
GPU_SHAPES = (
    Shape("Wan-1.3B 480×832", 12, 21, 1560, 0, 128),
    Shape("CogVideoX-2B 480×720", 30, 13, 1350, 226, 64),
    *SHAPES,
)
QUICK_SHAPES = (Shape("quick, joint", 2, 4, 12, 7, 24),)


def ours_by(backend: str) -> Callable:
    """frame_band_attention by one backend."""

    def ours(q, k, v, frames, g):
        found = frame_band_attention(q, k, v, frames, frames, sigma=SIGMA, backend=backend)
        return (as_layers_take_it(found.out),)

    return ours


def eager(q, k, v, frames, g):
    """Every step in full."""
    s = q @ k.mT * q.shape[-1] ** -0.5
    s = s + s.amax(-1, keepdim=True) * g
    return (as_layers_take_it(s.softmax(-1) @ v),)


def sdpa_and_mask(q, k, v, frames, g):
    """Stock attention, the band as its mask."""
    s = q @ k.mT * q.shape[-1] ** -0.5
    mask = s.amax(-1, keepdim=True) * g
    return (as_layers_take_it(scaled_dot_product_attention(q, k, v, attn_mask=mask)),)


def sdpa_alone(q, k, v, frames, g):
    """No band: the floor."""
    return (as_layers_take_it(scaled_dot_product_attention(q, k, v)),)


RIVALS: dict[str, Callable] = {FLOOR: sdpa_alone, "eager": eager, "sdpa+mask": sdpa_and_mask}


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Random query, key and value, the frame of every token, and G `[N, N]`,
    which the rivals' users would make once.
    """
    q, k, v = (as_layers_have_it(1, shape.heads, shape.tokens, shape.dim, device, dtype) for _ in range(3))
    frames = torch.arange(shape.frames, dtype=torch.int32).repeat_interleave(shape.positions)
    frames = torch.cat([torch.full((shape.text,), -1, dtype=torch.int32), frames]).to(device)
    distance = (frames[:, None] - frames).float()
    inside = (frames[:, None] >= 0) & (frames >= 0)
    band = (-distance.square() / (2 * SIGMA**2)).exp() * inside
    return q, k, v, frames, band.to(dtype)


def cases(device: torch.device, quick: bool) -> tuple[Shape, ...]:
    """The layers."""
    if quick:
        return QUICK_SHAPES
    return SHAPES if device.type == "cpu" else GPU_SHAPES


def measure(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times and memory of every arm on one layer.

    Raises:
        AssertionError: if an arm does not compute what ours computes: a wrong result is not timed.
    """
    inputs = make_inputs(shape, device, dtype)
    arms = RIVALS | arms_by_backend("frame_band_attention", ours_by, device, dtype)
    calls = passes(arms, inputs, (0, 1, 2))
    banded = {name: call for name, call in calls["forward"].items() if name != FLOOR}
    assert_agreement(banded, 2e-4 if dtype == torch.float32 else 3e-2)
    result: dict[str, Any] = {
        "shape": shape._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "flops": shape.flops,
        "matrix_bytes": shape.matrix_bytes(inputs[0].element_size()),
    }
    for kind, timed in calls.items():
        result[kind] = median_seconds(timed, device, rounds)
        result[f"{kind}_extra_bytes"] = {
            name: extra_bytes(arm, device) for name, arm in timed.items() if isinstance(result[kind][name], float)
        }
    return result


def show(layer: dict[str, Any], report: dict[str, Any]) -> None:
    """Prints one layer's arms: time, and peak memory beyond the inputs (`-`: cannot be told)."""
    shape = Shape(**layer["shape"])
    print(
        f"{shape.name}  [1, {shape.heads}, {shape.tokens}, {shape.dim}] {layer['dtype']}, {shape.frames} frames, "
        f"σ = {SIGMA:g}; N×N: {layer['matrix_bytes'] / 2**20:.0f} MiB"
    )
    print(f"  {'':18}  {'forward':>11}  {'memory':>10}  {'+ backward to q, k, v':>21}  {'memory':>10}")
    for name in layer["forward"]:
        cells = [f"  {name:18}"]
        for kind, width in (("forward", 11), ("forward_backward", 21)):
            took = layer[kind][name]
            if isinstance(took, str):
                cells.append(took)
                continue
            extra = layer[f"{kind}_extra_bytes"][name]
            cells.append(f"{took * 1e3:.1f} ms".rjust(width))
            cells.append(("-" if extra is None else f"{extra / 2**20:.0f} MiB").rjust(10))
        print("  ".join(cells))
