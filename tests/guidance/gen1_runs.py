"""Pipelines whose temporal layers all do something, and a look at their calls."""

from __future__ import annotations

import torch

from cvg_kernels.pipeline.temporal_layers import temporal_modules
from tests import offline_pipelines

SCALE = 6.0


def build(name: str):
    """A pipeline whose temporal layers all do something: stock ones begin as the identity here and there."""
    pipe, options = offline_pipelines.BUILDERS[name]()
    pipe.unet.eval()
    torch.manual_seed(1)
    for module in temporal_modules(pipe.unet):
        for parameter in module.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    return pipe, options | {"guidance_scale": SCALE}


class Calls:
    """Counts evaluations of the network, and keeps what the pipeline calls it with and gives to the scheduler."""

    def __init__(self, pipe) -> None:
        self.pipe = pipe
        self.evaluations = 0
        self.calls: list[tuple] = []
        self.used: list[torch.Tensor] = []

    def __enter__(self):
        def count(*_):
            self.evaluations += 1

        def note(module, args, kwargs):
            if len(self.calls) == len(self.used):  # else a method calls, in the pipeline's own call
                self.calls.append((args, kwargs))

        step = self.pipe.scheduler.step

        def spy(model_output, *args, **kwargs):
            self.used.append(model_output.clone())
            return step(model_output, *args, **kwargs)

        self.pipe.scheduler.step = spy
        self.hooks = [
            self.pipe.unet.conv_in.register_forward_pre_hook(count),
            self.pipe.unet.register_forward_pre_hook(note, with_kwargs=True),
        ]
        return self

    def __exit__(self, *error):
        del self.pipe.scheduler.step
        for hook in self.hooks:
            hook.remove()
