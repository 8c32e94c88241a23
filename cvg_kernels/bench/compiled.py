"""What capture costs in a compiled denoiser: calls of a Wan transformer with random weights, eager and compiled.

Every block's text attention is captured for three tokens. Needs diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from cvg_kernels.bench.harness import assert_agreement, median_seconds
from cvg_kernels.pipeline.layer_capture import LayerCapture
from cvg_kernels.pipeline.layers import attention_layers

KIND, ROUNDS = "networks", {"cpu": 15, "gpu": 30}
TEXT, TOKENS, CHANNELS = 64, (3, 4, 9), 16


class Network(NamedTuple):
    """A transformer and its video."""

    layers: int
    heads: int
    frames: int
    side: int  #: rows and columns of the latents
    backend: str  #: of `torch.compile`


def cases(device: torch.device, quick: bool) -> list[Network]:
    """A small network; `quick`: a tiny one that the compiler does not translate."""
    return [Network(1, 2, 1, 4, "eager") if quick else Network(4, 6, 5, 32, "inductor")]


def measure(case: Network, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Median seconds of a call: whole network and its blocks compiled, without capture, with maps, with their
    gradient.
    """
    eager, whole, blocks = (_network(case, device, dtype) for _ in range(3))
    whole.compile(backend=case.backend, fullgraph=True)
    blocks.compile_repeated_blocks(backend=case.backend, fullgraph=True)
    call = {
        "hidden_states": torch.randn(1, CHANNELS, case.frames, case.side, case.side),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TEXT, 64),
    }
    call = {name: one.to(device, dtype if one.is_floating_point() else one.dtype) for name, one in call.items()}
    networks = {"eager": eager, "whole": whole, "blocks": blocks}
    found = {}
    for kind, make in (("forward", _stock), ("captured", _captured), ("gradient", _gradient)):
        arms = {name: make(network, call) for name, network in networks.items()}
        assert_agreement(dict(reversed(arms.items())), 1e-3)
        found[kind] = median_seconds(arms, device, rounds)
    return case._asdict() | {"tokens": case.frames * (case.side // 2) ** 2} | found


def show(figures: dict[str, Any], report: dict[str, Any]) -> None:
    """Prints one line for what is computed, one figure an arm."""
    print(f"{figures['layers']} blocks, {figures['tokens']} tokens, {figures['backend']}")
    for kind in ("forward", "captured", "gradient"):
        arms = (f"{name} {took * 1e3:.1f} ms" for name, took in figures[kind].items())
        print(f"  {kind:9} {', '.join(arms)}")


def _network(case: Network, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=case.heads,
            attention_head_dim=64,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=64,
            freq_dim=256,
            ffn_dim=256 * case.heads,
            num_layers=case.layers,
            rope_max_seq_len=64,
        )
    return network.to(device, dtype).eval().requires_grad_(False)


def _stock(network: nn.Module, call: dict[str, Any]) -> Callable[[], Any]:
    @torch.no_grad()
    def run():
        return network(**call, return_dict=False)

    return run


def _layer_capture(network: nn.Module) -> LayerCapture:
    names = [layer.name for layer in attention_layers(network) if layer.kind == "cross"]
    return LayerCapture(network, torch.tensor([TOKENS]), names, stop_after_last=False)


def _captured(network: nn.Module, call: dict[str, Any]) -> Callable[[], Any]:
    layers = _layer_capture(network)

    @torch.no_grad()
    def run():
        with layers:
            return tuple(layers.run(lambda: network(**call)).values())

    return run


def _gradient(network: nn.Module, call: dict[str, Any]) -> Callable[[], Any]:
    layers = _layer_capture(network)

    def run():
        latents = call["hidden_states"].clone().requires_grad_()
        with layers:
            maps = layers.run(lambda: network(**{**call, "hidden_states": latents}))
            loss = sum(one.square().sum() for one in maps.values())
            return torch.autograd.grad(loss, latents)

    return run
