"""Attention with capture against what people use today, on layers of real models.

Every arm returns the layer's output and the maps of eight tokens, averaged over heads:

* eager: softmax(q kᵀ) in full, as DAAM, Attend-and-Excite and Vico do;
* sdpa+softmax: stock attention for the output, a separate softmax for the maps;
* v-augmented: one-hot columns appended to v, so that stock attention returns the maps as extra columns;
* flex+lse (GPU): FlexAttention returns the log-sum-exp, and the maps are recomputed from it.

`sdpa alone` makes no maps: it is the floor that capture is measured against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from cvg_kernels.bench.harness import (
    assert_agreement,
    extra_bytes,
    forward,
    forward_backward,
    median_seconds,
)
from cvg_kernels.ops import attention_with_capture

KIND, ROUNDS = "layers", {"cpu": 7, "gpu": 50}
TOKENS = 8
FLOOR = "sdpa alone"
OURS = "cvg_kernels"


class Shape(NamedTuple):
    """A layer: batch, heads, queries, keys, head dimension."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int

    @property
    def flops(self) -> int:
        """Of the forward pass: two products."""
        return 4 * self.batch * self.heads * self.queries * self.keys * self.dim


CPU_SHAPES = (
    Shape("AnimateDiff 64×64 cross", 16, 8, 4096, 77, 40),
    Shape("VideoCrafter2 40×64 cross", 16, 5, 2560, 77, 64),
    Shape("Wan-1.3B cross, a quarter", 1, 12, 8190, 512, 128),
    Shape("CogVideoX-2B joint, an eighth", 1, 30, 2274, 2274, 64),
)
GPU_SHAPES = (
    Shape("VideoCrafter2 40×64 cross", 16, 5, 2560, 77, 64),
    Shape("AnimateDiff 64×64 cross", 16, 8, 4096, 77, 40),
    Shape("Wan-1.3B cross", 1, 12, 32760, 512, 128),
    Shape("CogVideoX-2B joint", 1, 30, 17776, 17776, 64),
)
QUICK_SHAPES = (Shape("quick cross", 2, 2, 96, 20, 16), Shape("quick joint", 1, 2, 600, 600, 16))


def ours(q, k, v, ids):
    """attention_with_capture."""
    captured = attention_with_capture(q, k, v, ids)
    return captured.out, captured.maps


def eager(q, k, v, ids):
    """The whole probability matrix."""
    p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return p @ v, p[..., ids].mean(1).mT


def sdpa_and_softmax(q, k, v, ids):
    """Stock attention, and the probabilities once more."""
    p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return scaled_dot_product_attention(q, k, v), p[..., ids].mean(1).mT


def v_augmented(q, k, v, ids):
    """One-hot columns beside v: the extra columns of the output are the maps."""
    hot = torch.zeros(k.shape[2], TOKENS, dtype=v.dtype, device=v.device)
    hot[ids, torch.arange(TOKENS, device=v.device)] = 1
    wide = torch.cat([v, hot.expand(*v.shape[:2], -1, -1)], -1)
    out = scaled_dot_product_attention(q, k, wide, scale=q.shape[-1] ** -0.5)
    return out[..., : v.shape[-1]], out[..., v.shape[-1] :].mean(1).mT


def sdpa_alone(q, k, v, ids):
    """No maps: the floor."""
    return (scaled_dot_product_attention(q, k, v),)


def flex_and_lse(q, k, v, ids):
    """FlexAttention with its log-sum-exp, maps recomputed from it."""
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = _compiled_flex()(q, k, v, return_aux=AuxRequest(lse=True))
    logits = (q @ k[:, :, ids].mT).float() * q.shape[-1] ** -0.5
    return out, (logits - aux.lse[..., None]).exp().mean(1).mT


def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def arms_for(device: torch.device) -> dict[str, Callable]:
    """The arms of a device, ours last."""
    arms = {
        FLOOR: sdpa_alone,
        "eager": eager,
        "sdpa+softmax": sdpa_and_softmax,
        "v-augmented": v_augmented,
    }
    if device.type == "cuda":
        arms["flex+lse"] = flex_and_lse
    return arms | {OURS: ours}


def cases(device: torch.device, quick: bool) -> tuple[Shape, ...]:
    """The layers of a device."""
    return QUICK_SHAPES if quick else CPU_SHAPES if device.type == "cpu" else GPU_SHAPES


def measure(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times and memory of every arm on one layer.

    Raises:
        AssertionError: if an arm does not compute what ours computes: a wrong result is not timed.
    """
    b, h, n, m, d = shape[1:]
    q = torch.randn(b, h, n, d, device=device).to(dtype)
    k, v = (torch.randn(b, h, m, d, device=device).to(dtype) for _ in range(2))
    ids = torch.arange(TOKENS, device=device)
    inputs = (q, k, v, ids)
    arms = arms_for(device)
    calls = {name: forward(arm, inputs) for name, arm in arms.items()}
    # maps of the rivals in bfloat16 are good to a few percent only
    assert_agreement(calls, 2e-4 if dtype == torch.float32 else 3e-2)
    result = {
        "shape": shape._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "output_bytes": q.numel() * q.element_size() + 4 * b * n * (TOKENS + h),
        "forward": median_seconds(calls, device, rounds),
        "forward_backward": median_seconds(
            {name: forward_backward(arm, inputs) for name, arm in arms.items()}, device, rounds
        ),
        "stock_forward_full_backward": median_seconds(
            {FLOOR: forward_backward(sdpa_alone, inputs, (0, 1, 2))}, device, rounds
        )[FLOOR],
        "forward_extra_bytes": {},
    }
    for name, call in calls.items():
        if isinstance(result["forward"][name], float):
            result["forward_extra_bytes"][name] = extra_bytes(call, device)
    return result


def show(layer: dict[str, Any], report: dict[str, Any]) -> None:
    """Prints one layer's arms."""
    shape, peak = Shape(**layer["shape"]), report["matrix_product_flops"]
    b, h, n, m, d = shape[1:]
    print(f"{shape.name}  [{b}, {h}, {n}×{m}, {d}] {layer['dtype']}, {TOKENS} tokens, head mean")
    print(
        f"  {'':14}  {'forward':>10}  {'of a@b':>7}  {'+ backward to q':>15}  {'extra memory / outputs':>22}"
    )
    for name in layer["forward"]:
        forward, both = layer["forward"][name], layer["forward_backward"][name]
        if isinstance(forward, str):
            print(f"  {name:14}  {forward}")
            continue
        extra = layer["forward_extra_bytes"].get(name)
        share = "-" if extra is None else f"{extra / layer['output_bytes']:.2f}"
        later = both if isinstance(both, str) else f"{both * 1e3:.2f} ms"
        print(
            f"  {name:14}  {forward * 1e3:7.2f} ms  {shape.flops / forward / peak:7.0%}  {later:>15}  {share:>22}"
        )
