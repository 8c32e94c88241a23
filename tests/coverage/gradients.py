"""The gradient of a loss of the maps on the latents:
by the way that latent methods take, and by eager PyTorch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cvg_kernels.guidance import Guidance, Run
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.layer_capture import LayerCapture
from cvg_kernels.pipeline.layers import attention_layers
from cvg_kernels.prompts.token_table import TokenTable
from tests.coverage import oracle
from tests.coverage.row import WORDS, Row


@dataclass(frozen=True)
class Probe(Guidance):
    """Moves nothing: notes the gradient of Σ weights · maps at the first step.

    Attributes:
        weights: layer → `[words, F·h·w]`.
        found: is given the latents, their factor before the denoiser, the gradient and the layers.
        backend: which implementation to use.
    """

    weights: dict[str, torch.Tensor]
    found: dict[str, Any]
    backend: str = "auto"

    def before_step(self, call: Call, run: Run) -> None:
        if self.found:  # FreeInit goes through the schedule again
            return
        table = TokenTable.of(call.find([WORDS]))
        names = [layer.name for layer in attention_layers(call.denoiser) if layer.name in self.weights]
        z = call.latents.detach().requires_grad_()
        with LayerCapture(call.denoiser, table.ids, names, backend=self.backend) as layers:
            maps = layers.run(lambda: call.denoise(z))
            maps = {name: table.by_word(one)[0].flatten(1) for name, one in maps.items()}
            loss = sum((maps[name] * self.weights[name]).sum() for name in names)
            (gradient,) = torch.autograd.grad(loss, z)
        self.found.update(latents=z.detach(), scale=call.scale, gradient=gradient, names=names)


def ours(row: Row, weights: dict[str, torch.Tensor], backend: str = "auto") -> dict[str, Any]:
    """What `Probe` finds at the first step of a run."""
    found: dict[str, Any] = {}
    with Probe(weights, found, backend, stop=0.01).attach(row.pipe):
        row.run()
    return found


def eager(row: Row, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The stock run's first call with the prompt, made again: its latents, and the gradient on them.

    Returns:
        Both in the denoiser's order of axes, the prompt's rows alone, with the channels of conditions.
    """
    call = row.watch.calls[row.first]
    latents = call.latents
    z = latents.detach().clone().requires_grad_()
    args = tuple(z if one is latents else one for one in call.args)
    arguments = {key: z if one is latents else one for key, one in call.arguments.items()}
    needed = [(parameter, parameter.requires_grad) for parameter in call.denoiser.parameters()]
    for parameter, _ in needed:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad(), oracle.watched([call.denoiser], keep_graph=True) as watch:
            call.denoiser(*args, **arguments)
            loss = sum((maps * weights[layer].double()).sum() for layer, maps in row.seen_maps(watch, 0))
            (gradient,) = torch.autograd.grad(loss, z)
    finally:
        for parameter, was in needed:
            parameter.requires_grad_(was)
    rows = row.rows(len(z))
    return z.detach()[rows], gradient[rows]


def error(row: Row, weights: dict[str, torch.Tensor], found: dict[str, Any]) -> float:
    """The relative error of the gradient that `ours` has found;
    asserts that it was taken at the stock run's latents.
    """
    given, wanted = eager(row, weights)
    assert float(wanted.norm()) > 0
    axis = row.case.channel_axis % given.ndim
    channels = found["latents"].shape[1]  # those of conditions stand behind
    given, wanted = (one.narrow(axis, 0, channels) for one in (given, wanted))

    def native(latents: torch.Tensor) -> torch.Tensor:
        """Latents `[B, C, F, H, W]` as the denoiser takes them, packed to a sequence or not."""
        latents = latents.flatten(2) if given.ndim == 3 else latents
        return latents.movedim(1, axis)

    torch.testing.assert_close(native(found["latents"]) * found["scale"], given, rtol=1e-5, atol=1e-6)
    gradient = native(found["gradient"]) / found["scale"]
    return float((gradient - wanted).norm() / wanted.norm())
