"""A known move of the latents, on every tiny pipeline:
what the denoiser is given, and what its scheduler makes of it.
"""

from __future__ import annotations

import functools
import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from cvg_kernels.guidance.base import Guidance  # noqa: E402
from cvg_kernels.pipeline.models import MODELS, unwrap  # noqa: E402
from tests.pipeline.matrix import KNOWN, Built  # noqa: E402
from tests.pipelines import denoisers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Push(Guidance):
    """Moves the latents by a given tensor `[1, C, F, H, W]` at one step."""

    by: torch.Tensor | None = None
    at: int = 0

    def before_step(self, call, run):
        return call.latents + self.by if call.index == self.at else None


@dataclass
class Seen:
    """What a run has given to its denoiser and got from its scheduler."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)  # of the scheduler's steps
    after: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def fixed_predictions(built: Built, seen: Seen):
    """The denoiser predicts numbers that do not depend on what it is given, so that only the move is seen."""
    pipe, name = built.pipe, MODELS[built.case.denoiser].latents
    scheduler = type(pipe.scheduler)
    stock_step = scheduler.step

    def fixed(module, args, kwargs, output):
        generator = torch.Generator().manual_seed(len(seen.inputs))
        prediction = torch.randn(output[0].shape, generator=generator)
        return (prediction, *output[1:]) if isinstance(output, tuple) else type(output)(prediction)

    @functools.wraps(stock_step)
    def step(self, *args, **options):
        result = stock_step(self, *args, **options)
        seen.timesteps.append(float(options["timestep"] if "timestep" in options else args[1]))
        seen.after.append(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    with pytest.MonkeyPatch.context() as patch:
        handles = []
        for denoiser in denoisers(pipe):
            network = unwrap(denoiser)
            handles.append(network.register_forward_hook(fixed, with_kwargs=True))
            patch.setattr(network, "forward", _noting(network.forward, name, seen.inputs))
        patch.setattr(scheduler, "step", step)
        yield
    for handle in handles:
        handle.remove()


def _noting(stock, name, inputs):
    """A forward that notes the latents with which it is really called."""

    def forward(*args, **kwargs):
        inputs.append((kwargs[name] if name in kwargs else args[0]).detach().clone())
        return stock(*args, **kwargs)

    return forward


def alpha(scheduler, timestep: float) -> float:
    """α of x₀ in the latents at a timestep; at the end of the schedule beyond the last."""
    if timestep < 0:
        return math.sqrt(float(scheduler.final_alpha_cumprod))
    return math.sqrt(float(scheduler.alphas_cumprod[int(timestep)]))


def effect(scheduler, timesteps: list[float], at: int, step: int) -> float:
    """By which factor a move at step `at` stands in the latents after `step`, the predictions being what they are.

    Flows: x₀ and the noise of z = (1 − s)x₀ + sε are both moved by δ, so z' is. Predicted noise: it stays, x₀ is moved
    by δ/α, so z' = α'x₀ + σ'ε is by α'δ/α; and over several steps all factors but the first and the last cancel.
    """
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas", False):
        return 1.0
    assert scheduler.config.prediction_type == "epsilon"
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return alpha(scheduler, timesteps[step] - stride) / alpha(scheduler, timesteps[at])


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("built", KNOWN, indirect=True)
@pytest.mark.drawn(24)
def test_a_move_reaches_the_scheduler(built, at):
    case, pipe = built.case, built.pipe
    channels = unwrap(denoisers(pipe)[0]).config.in_channels - case.condition_channels
    by = torch.randn(1, channels, *case.latents)
    stock, guided = Seen(), Seen()
    with fixed_predictions(built, stock):
        plain = built.run()
    with fixed_predictions(built, guided), Push(by=by, at=at).attach(pipe) as run:
        moved = built.run()
    assert run.guided == [(0, at)] * case.rounds

    given = by.clone()
    if case.name == "wan22_ti2v_image":
        given[:, :, 0] = 0  # the frame of the image stays
    native = given.movedim(1, case.channel_axis)
    calls = 1 if case.batched else len(case.branches)
    for call in range(at * calls):
        assert torch.equal(guided.inputs[call], stock.inputs[call])
    for call in range(at * calls, (at + 1) * calls):  # all branches of the step
        change = (guided.inputs[call] - stock.inputs[call]).movedim(case.channel_axis, 1)
        assert change[:, channels:].shape[1] == case.condition_channels
        assert not change[:, channels:].any()
        want = given.expand(len(change), -1, -1, -1, -1)
        torch.testing.assert_close(change[:, :channels], want, rtol=1e-4, atol=1e-5)

    for step in range(built.steps):
        change = guided.after[step] - stock.after[step]
        if step < at:
            assert not change.any()
            continue
        want = effect(pipe.scheduler, stock.timesteps, at, step) * native
        if change.ndim == 4:  # ModelScope's scheduler is given the frames one by one
            change = change[None].transpose(1, 2)
        torch.testing.assert_close(change, want, rtol=1e-4, atol=1e-4)
    if case.rounds == 1 and built.options.get("output_type") == "latent":
        torch.testing.assert_close(moved - plain, want, rtol=1e-4, atol=1e-4)
    built.is_as_before()
