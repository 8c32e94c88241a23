"""Attention with capture against what people use today, on layers of real models.

Query, key and value lie as diffusers' layers give them, `[B, N, H, D]` seen as `[B, H, N, D]`, and every arm makes of
its output what those layers do next, `[B, N, H·D]`: an arm whose output lies otherwise pays for the copy. Every arm
returns that and the maps of eight tokens, averaged over heads:

* eager: softmax(q kᵀ) in full, as DAAM, Attend-and-Excite and Vico do;
* sdpa+softmax: stock attention for the output, a separate softmax for the maps;
* v-augmented: one-hot columns appended to v, so that stock attention returns the maps as extra columns;
* flex+lse (GPU): FlexAttention returns the log-sum-exp, and the maps are recomputed from it;
* cvg_kernels and a backend: ours by that backend; cvg_kernels alone is as `auto` chooses.

Arms that are stock attention alone make no maps: the fastest of them is the floor that capture is measured against.
There is `sdpa alone`, as torch chooses, one for each of torch's backends, and flash_attn's where that package is
installed.

On a GPU every arm is timed as it is called and, but for those that hold the N×M matrix, as a CUDA graph, where no
Python is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cvg_kernels.bench import host_cost
from cvg_kernels.bench.harness import (
    OURS,
    arms_by_backend,
    as_layers_have_it,
    as_layers_take_it,
    assert_agreement,
    extra_bytes,
    forward_backward,
    median_seconds,
    passes,
    seconds_by_kind,
)
from cvg_kernels.ops import attention_with_capture

KIND, ROUNDS = "layers", {"cpu": 7, "gpu": 50}
TOKENS = 8
FLOOR = "sdpa alone"
#: Arms that hold the N×M matrix. A graph keeps its memory, and these would leave none for the others.
_LARGE = ("eager", "sdpa+softmax")
#: torch's own backends, by the kind of device.
STOCK = {
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
    "cuda": {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
}


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
GPU_SHAPES = (  # what matters most first: time may end
    Shape("CogVideoX-2B joint", 1, 30, 17776, 17776, 64),
    Shape("Wan-1.3B cross", 1, 12, 32760, 512, 128),
    Shape("VideoCrafter2 40×64 cross", 16, 5, 2560, 77, 64),
    Shape("AnimateDiff 64×64 cross", 16, 8, 4096, 77, 40),
    Shape("LTX-Video cross", 1, 32, 4992, 128, 64),
    Shape("Mochi's width, 256 keys of text", 1, 24, 22528, 256, 128),
    Shape("CogVideoX-2B, its 226 keys of text", 1, 30, 17550, 226, 64),
)
QUICK_SHAPES = (Shape("quick cross", 2, 2, 96, 20, 16), Shape("quick joint", 1, 2, 300, 300, 16))


def ours_by(backend: str) -> Callable:
    """attention_with_capture by one backend."""

    def ours(q, k, v, ids):
        captured = attention_with_capture(q, k, v, ids, backend=backend)
        return as_layers_take_it(captured.out), captured.maps

    return ours


def eager(q, k, v, ids):
    """The whole probability matrix."""
    p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return as_layers_take_it(p @ v), p[..., ids].mean(1).mT


def sdpa_and_softmax(q, k, v, ids):
    """Stock attention, and the probabilities once more."""
    p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return as_layers_take_it(scaled_dot_product_attention(q, k, v)), p[..., ids].mean(1).mT


def v_augmented(q, k, v, ids):
    """One-hot columns beside v: the extra columns of the output are the maps."""
    hot = torch.zeros(k.shape[2], TOKENS, dtype=v.dtype, device=v.device)
    hot[ids, torch.arange(TOKENS, device=v.device)] = 1
    wide = torch.cat([v, hot.expand(*v.shape[:2], -1, -1)], -1)
    out = scaled_dot_product_attention(q, k, wide, scale=q.shape[-1] ** -0.5)
    return as_layers_take_it(out[..., : v.shape[-1]]), out[..., v.shape[-1] :].mean(1).mT


def sdpa_alone(q, k, v, ids):
    """No maps: a floor."""
    return (as_layers_take_it(scaled_dot_product_attention(q, k, v)),)


def sdpa_by(backend: SDPBackend) -> Callable:
    """No maps, by one of torch's backends."""

    def sdpa(q, k, v, ids):
        with sdpa_kernel(backend):
            return sdpa_alone(q, k, v, ids)

    return sdpa


def flash_attn_alone(q, k, v, ids):
    """No maps, by the package flash_attn, which takes `[B, N, H, D]`."""
    from flash_attn import flash_attn_func

    out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return (out.flatten(2),)


def flex_and_lse() -> Callable:
    """FlexAttention with its log-sum-exp, maps recomputed from it."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    compiled = torch.compile(flex_attention)

    def flex(q, k, v, ids):
        out, aux = compiled(q, k, v, return_aux=AuxRequest(lse=True))
        logits = (q @ k[:, :, ids].mT).float() * q.shape[-1] ** -0.5
        return as_layers_take_it(out), (logits - aux.lse[..., None]).exp().mean(1).mT

    return flex


def floors_for(device: torch.device) -> dict[str, Callable]:
    """The arms that make no maps."""
    floors = {FLOOR: sdpa_alone}
    stock = STOCK.get(device.type, {})
    floors |= {f"sdpa {name}": sdpa_by(backend) for name, backend in stock.items()}
    if device.type == "cuda" and find_spec("flash_attn") is not None:
        floors["flash_attn alone"] = flash_attn_alone
    return floors


def arms_for(device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """The arms of a device, ours last."""
    arms = floors_for(device)
    arms |= {"eager": eager, "sdpa+softmax": sdpa_and_softmax, "v-augmented": v_augmented}
    if device.type == "cuda":
        arms["flex+lse"] = flex_and_lse()
    return arms | arms_by_backend("attention", ours_by, device, dtype)


def cases(device: torch.device, quick: bool) -> tuple[Shape, ...]:
    """The layers of a device."""
    return QUICK_SHAPES if quick else CPU_SHAPES if device.type == "cpu" else GPU_SHAPES


def once(device: torch.device, dtype: torch.dtype, rounds: int = 21) -> dict[str, Any]:
    """Measures and prints what a call costs in Python, without and with gradients."""
    q, k, v = (as_layers_have_it(1, 2, 16, 16, device, dtype) for _ in range(3))
    ids = torch.arange(2, device=device)
    cost = host_cost.python_cost(
        lambda q, k, v: attention_with_capture(q, k, v, ids).out,
        scaled_dot_product_attention,
        (q, k, v),
        device,
        rounds,
    )
    host_cost.show(cost)
    return {"python_cost": cost}


def measure(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times and memory of every arm on one layer.

    Raises:
        AssertionError: if an arm does not compute what ours computes: a wrong result is not timed.
    """
    b, h, n, m, d = shape[1:]
    q, k, v = (as_layers_have_it(b, h, tokens, d, device, dtype) for tokens in (n, m, m))
    ids = torch.arange(TOKENS, device=device)
    inputs = (q, k, v, ids)
    arms = arms_for(device, dtype)
    calls = passes(arms, inputs)
    # maps of the rivals in bfloat16 are good to a few percent only
    assert_agreement(calls["forward"], 2e-4 if dtype == torch.float32 else 3e-2)
    result = {
        "shape": shape._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "output_bytes": q.numel() * q.element_size() + 4 * b * n * (TOKENS + h),
        "floors": list(floors_for(device)),
    }
    result |= seconds_by_kind(calls, device, rounds, in_graphs=lambda name: name not in _LARGE)
    result["stock_forward_full_backward"] = median_seconds(
        {FLOOR: forward_backward(sdpa_alone, inputs, (0, 1, 2))}, device, rounds
    )[FLOOR]
    result["forward_extra_bytes"] = {
        name: extra_bytes(call, device)
        for name, call in calls["forward"].items()
        if isinstance(result["forward"][name], float)
    }
    return result


def show(layer: dict[str, Any], report: dict[str, Any]) -> None:
    """Prints one layer's arms, and ours against the fastest that makes no maps."""
    shape, peak = Shape(**layer["shape"]), report["matrix_product_flops"]
    b, h, n, m, d = shape[1:]
    print(f"{shape.name}  [{b}, {h}, {n}×{m}, {d}] {layer['dtype']}, {TOKENS} tokens, head mean")
    print(
        f"  {'':18}  {'forward':>10}  {'of a@b':>7}  {'+ backward to q':>15}  {'extra memory / outputs':>22}"
        + (f"  {'CUDA graph':>11}  {'+ backward to q':>15}" if "forward_graph" in layer else "")
    )
    for name, took in layer["forward"].items():
        if isinstance(took, str):
            print(f"  {name:18}  {took}")
            continue
        extra = layer["forward_extra_bytes"].get(name)
        share = "-" if extra is None else f"{extra / layer['output_bytes']:.2f}"
        cells = [
            f"{_ms(took):>10}",
            f"{shape.flops / took / peak:7.0%}",
            f"{_ms(layer['forward_backward'][name]):>15}",
            f"{share:>22}",
        ]
        if "forward_graph" in layer:
            cells.append(f"{_ms(layer['forward_graph'].get(name, '-')):>11}")
            cells.append(f"{_ms(layer['forward_backward_graph'].get(name, '-')):>15}")
        print(f"  {name:18}  {'  '.join(cells)}")
    for kind in ("forward", "forward_graph", "forward_backward", "forward_backward_graph"):
        times = {name: took for name, took in layer.get(kind, {}).items() if isinstance(took, float)}
        stock = {name: times[name] for name in layer["floors"] if name in times}
        if stock and OURS in times:
            fastest = min(stock, key=stock.get)
            ratio = times[OURS] / stock[fastest]
            print(f"  {kind.replace('_', ' ')}: ×{ratio:.2f} of {fastest}, the fastest without maps")


def _ms(took: float | str) -> str:
    return took.partition(":")[0] if isinstance(took, str) else f"{took * 1e3:.2f} ms"
