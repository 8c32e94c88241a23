"""What a test knows about a tiny pipeline before it runs it, and the one way to run one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch

PROMPT = "a red cat and a blue dog"
STEPS = 3  # that `run` asks for, where a case does not ask for another number

#: The diffusers that all builders are for; with an older one, those of newer parts are skipped.
NEWEST = (0, 42)

#: How far results that are equal but for the order of roundings may lie apart in float64, guided ones too: guidance
#: that amplifies roundings a hundred-millionfold stays below it. What comes out as a video is rounded to float32.
SAME = {"rtol": 1e-6, "atol": 1e-6}

#: How classifier-free guidance stacks its branches in a batch.
STACKED = ("uncond", "cond")


@dataclass(frozen=True, kw_only=True)
class PipelineCase:
    """A pipeline of diffusers, made small, and the facts that tests may count on; test_builders.py checks them."""

    name: str
    #: Returns the pipeline and the arguments it is called with beside the prompt; skips the test where `needs` are
    #: absent.
    build: Callable[..., tuple[Any, dict[str, Any]]]
    #: The class of its denoiser, as diffusers names it.
    denoiser: str
    #: "text", "image-to-video", "video-to-video" or "control"
    task: str = "text"
    #: The arguments that hold images, videos or features to start from.
    takes: tuple[str, ...] = ()
    #: What a denoiser evaluation is for, in the order of the batch, or of the calls where they are not batched.
    branches: tuple[str, ...] = STACKED
    #: Whether one call of the denoiser holds all branches.
    batched: bool = True
    #: Whether some attention layers go over the frames alone.
    temporal: bool = False
    #: Frames, rows and columns of the latents; None where no test asks yet.
    latents: tuple[int, int, int] | None = None
    channel_axis: int = 1  # of the latents as the denoiser takes them
    #: Channels of the denoiser's input behind those of the latents.
    condition_channels: int = 0
    #: Share of the schedule that a video-to-video call keeps.
    strength: float = 1.0
    #: Denoisers that take turns over the schedule.
    experts: int = 1
    #: How often the schedule is gone through.
    rounds: int = 1
    #: Denoising steps that come on top.
    extra_steps: int = 0
    #: Denoiser calls on top of that, after which nothing steps.
    extra_calls: int = 0
    #: Calls of `scheduler.step` for one denoising step.
    updates: int = 1
    #: Packages that the tests can do without.
    needs: tuple[str, ...] = ()

    def denoising_steps(self, asked: int = STEPS) -> int:
        """Steps that a call with `num_inference_steps=asked` makes."""
        return self.rounds * int(asked * self.strength) + self.extra_steps

    def scheduler_steps(self, asked: int = STEPS) -> int:
        """Calls of `scheduler.step` in them."""
        return self.updates * self.denoising_steps(asked)

    def denoiser_calls(self, asked: int = STEPS) -> int:
        """Calls of the denoiser, or of all experts together."""
        calls = 1 if self.batched else len(self.branches)
        return calls * self.denoising_steps(asked) + self.extra_calls


def pipeline(*, needs: tuple[str, ...] = (), **facts: Any) -> Callable[[Callable], PipelineCase]:
    """Makes a builder a case that has its name; the weights come from seed 0, the test's own numbers from its own."""

    def case_of(builder: Callable) -> PipelineCase:
        @functools.wraps(builder)
        def build(*args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
            for package in needs:
                pytest.importorskip(package)
            with torch.random.fork_rng(devices=[]), _what_came_later():
                torch.manual_seed(0)
                pipe, call = builder(*args, **options)
            if hasattr(pipe, "set_progress_bar_config"):
                pipe.set_progress_bar_config(disable=True)
            return pipe, call

        return PipelineCase(name=builder.__name__, build=build, needs=needs, **facts)

    return case_of


def older_than_the_builders() -> bool:
    """Whether the installed diffusers came before the one that the builders are for."""
    return tuple(map(int, diffusers.__version__.split(".")[:2])) < NEWEST


@contextmanager
def _what_came_later() -> Iterator[None]:
    """Skips a test whose pipeline needs what an older diffusers, or the transformers of its time, does not have.

    That is a class, a module, or an argument of a class.
    """
    try:
        yield
    except (AttributeError, ImportError, TypeError) as error:
        if older_than_the_builders():
            pytest.skip(f"diffusers {diffusers.__version__}: {error}")
        raise


def denoisers(pipe: Any) -> list[torch.nn.Module]:
    """Its denoiser, or its two experts."""
    found = (getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2"))
    return [denoiser for denoiser in found if denoiser is not None]


def in_float64(built: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """A built pipeline and its arguments in float64: for comparisons of two ways to one result, see `SAME`."""
    pipe, options = built
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    return pipe, {name: _widened(value) for name, value in options.items()}


def _widened(value: Any) -> Any:
    if isinstance(value, list):
        return [_widened(one) for one in value]
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


def is_modular(pipe: Any) -> bool:
    """Whether it is one of diffusers' modular pipelines, which came with 0.35."""
    kind = getattr(diffusers, "ModularPipeline", None)
    return kind is not None and isinstance(pipe, kind)


def run(pipe: Any, options: dict[str, Any] | None = None, prompt: Any = PROMPT, **changes: Any) -> torch.Tensor:
    """A short call from fixed noise; frames as a tensor.

    `pipe` may be a `PipelineCase`, which is then built. A prompt of the options gives way only to another than
    `PROMPT`; `prompt=None` leaves it out, for calls with embeddings.
    """
    if isinstance(pipe, PipelineCase):
        pipe, own = pipe.build()
        options = {**own, **(options or {})}
    settings = {"num_inference_steps": STEPS, "output_type": "pt", **(options or {}), **changes}
    modular = is_modular(pipe)
    takes_text = modular or "prompt" in inspect.signature(pipe.__call__).parameters
    if takes_text and prompt is not None and (prompt != PROMPT or "prompt" not in settings):
        settings["prompt"] = prompt
    settings["generator"] = torch.Generator().manual_seed(0)
    if modular:
        return torch.as_tensor(pipe(output="videos", **settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # I2VGenXL does not ask its generator
        return torch.as_tensor(pipe(**settings)[0])
