"""What the tests of the field's cases share: a method that moves latents by a known amount, what is on a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import cvg_kernels as cvg
from cvg_kernels.guidance import Guidance, Run
from cvg_kernels.pipeline.call import Call
from tests.pipelines import PIPELINES, denoisers

WORDS = ["cat", "dog"]


def vico(**options):
    return cvg.Vico(words=WORDS, stop=0.5, iterations=1, **options)


def build(name="animatediff"):
    return PIPELINES[name].build()


@dataclass(frozen=True)
class Push(Guidance):
    """Moves the latents of every guided step by the same, and notes what it saw."""

    by: float = 0.5

    def before_step(self, call: Call, run: Run) -> torch.Tensor:
        run.history.append({"step": call.index, "count": call.count, "timestep": call.timestep})
        return call.latents + self.by * pattern(call.latents.shape)


def pattern(shape: Any) -> torch.Tensor:
    """The same numbers whenever they are asked for."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(7))


def tree(pipe: Any) -> dict[str, Any]:
    """All that somebody could leave on a pipeline:
    classes, attributes, hooks, forwards and processors of its parts.
    """
    scheduler = pipe.scheduler
    found = {
        "classes": (type(pipe), type(scheduler)),
        "attributes": [
            name
            for owner in (pipe, scheduler)
            for name, value in vars(owner).items()
            if "cvg" in name or callable(getattr(type(owner), name, None))
        ],
    }
    encoder = getattr(pipe, "text_encoder", None)
    for network in [*denoisers(pipe), *([encoder] if encoder is not None else [])]:
        for name, module in network.named_modules():
            found[id(network), name] = (
                type(module),
                vars(module).get("forward"),
                [key for key in vars(module) if "cvg" in key],
                len(module._forward_pre_hooks),
                len(module._forward_hooks),
                id(getattr(module, "processor", None)),
                module._compiled_call_impl,
                [parameter.requires_grad for parameter in module.parameters(recurse=False)],
            )
    return found


def last_latents(pipe: Any, options: dict[str, Any], **changes: Any) -> torch.Tensor:
    """What a run hands to the autoencoder."""
    from tests.pipelines import run

    return run(pipe, options, **{"output_type": "latent", **changes})
