"""A move of the latents reaches every later call of the denoiser:
packed latents, given frames, other orders of axes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance.base import Guidance  # noqa: E402
from cvg_kernels.pipeline.models import MODELS  # noqa: E402
from tests.pipelines import PIPELINES, denoisers, run  # noqa: E402
from tests.pipelines.hunyuan import token_replaced  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

#: Pipelines whose schedulers are those of flows: what is added to a sample stays in it, whatever is predicted.
FLOWS = [
    "ltx",
    "ltx_i2v",
    "ltx_condition",
    "ltx2",
    "mochi",
    "easyanimate",
    "hunyuan_video",
    "framepack",
    "hunyuan_skyreels_i2v",
    "hunyuan_video15",
    "kandinsky5",
    "motif_video",
    "wan_animate",
    "anyflow",
    "sana_video",
]


@dataclass(frozen=True)
class Push(Guidance):
    """Moves the latents of the second step by random numbers."""

    made: list[torch.Tensor] = field(default_factory=list)

    def before_step(self, call, run):
        if call.index == 1:
            self.made.append(torch.randn(call.latents.shape))
            return call.latents + self.made[-1]


def inputs_of(pipe, options, case) -> list[torch.Tensor]:
    """What the denoiser is given, call by call, while it predicts numbers of its own."""
    seen = []
    (denoiser,) = denoisers(pipe)

    def noted(stock):
        def forward(*args, **kwargs):
            given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            seen.append(given.clone())  # Kandinsky steps in place
            return stock(*args, **kwargs)

        return forward

    def fixed(module, args, kwargs, output):
        generator = torch.Generator().manual_seed(len(seen))
        made = [
            torch.randn(one.shape, generator=generator) if torch.is_tensor(one) else one
            for one in (output if isinstance(output, tuple) else (output[0],))
        ]
        return tuple(made) if isinstance(output, tuple) else type(output)(made[0])

    hook = denoiser.register_forward_hook(fixed, with_kwargs=True)
    denoiser.forward = noted(denoiser.forward)
    try:
        run(pipe, options)
    finally:
        del denoiser.forward
        hook.remove()
    return seen


def check(case, pipe, options, given: int = 0, scale: bool = False) -> None:
    """Asserts that later calls are given latents that are moved as those of the step are, but for the first frames.

    `scale`: by the numbers of the move, but for a factor that the pipeline scales them by.
    """
    stock = inputs_of(pipe, options, case)
    push = Push()
    with push.attach(pipe) as guided:
        moved = inputs_of(pipe, options, case)
    assert guided.guided == [(0, 1)]
    (by,) = push.made
    by[:, :, :given] = 0
    want = by.movedim(1, -1).flatten(1, 3) if stock[0].ndim == 3 else by.movedim(1, case.channel_axis)
    each = 1 if case.batched else len(case.branches)
    assert len(stock) == len(moved) == 3 * each
    for number, (before, after) in enumerate(zip(stock, moved, strict=True)):
        change = after - before
        if number < each:
            assert not change.any()
            continue
        change = change.narrow(case.channel_axis, 0, want.shape[case.channel_axis])
        if scale and number == each:
            want = want * float((want * change).sum() / want.square().sum())
            assert 0.01 < float(want.std()) < 0.99
        torch.testing.assert_close(change, want.expand_as(change), rtol=1e-4, atol=1e-4)


@pytest.mark.drawn(3)
@pytest.mark.parametrize("name", FLOWS)
def test_a_move_is_in_every_later_call(name):
    case = PIPELINES[name]
    pipe, options = case.build()
    check(case, pipe, options, given=name in ("ltx_i2v", "ltx_condition"))


def test_a_move_where_the_pipeline_scales_by_itself():
    """Cosmos 2: c · x is moved by as much at every later step, for the x₀ made of c · x and the answer moves along."""
    case = PIPELINES["cosmos2_video2world"]
    pipe, options = case.build()
    check(case, pipe, options, given=1, scale=True)


def test_latents_that_are_not_those_of_the_scheduler(monkeypatch):
    """A pipeline that scales them unknown to the table: refused, not silently moved by something else."""
    monkeypatch.setitem(
        MODELS, "CosmosTransformer3DModel", replace(MODELS["CosmosTransformer3DModel"], scaled_by=None)
    )
    pipe, options = PIPELINES["cosmos2_video2world"].build()
    message = "gives its denoiser other latents than its scheduler steps on"
    with pytest.raises(cvg.ArgumentError, match=message), Push().attach(pipe):
        run(pipe, options)


def test_a_frame_whose_tokens_are_replaced_stays():
    case, (pipe, options) = PIPELINES["hunyuan_video_i2v"], token_replaced()
    check(case, pipe, options, given=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("skyreels_v2_df", "does not step with the `step` of its own scheduler"),
        ("anyflow_far", "kv_cache of AnyFlowFARTransformer3DModel holds all branches"),
    ],
)
def test_where_a_move_would_be_lost_it_is_refused(name, message):
    pipe, options = PIPELINES[name].build()
    if name == "anyflow_far":
        options |= {"guidance_scale": 4.0, "negative_prompt": "running"}
    with pytest.raises(cvg.ArgumentError, match=message), Push().attach(pipe):
        run(pipe, options)


def test_a_scheduler_that_is_asked_twice_for_a_step():
    """Cosmos 1: the step that counts starts from the moved sample too."""
    pipe, options = PIPELINES["cosmos"].build()
    samples = {}
    for name in ("stock", "moved"):
        seen = samples[name] = []
        scheduler = type(pipe.scheduler)
        stock = scheduler.step

        def step(self, model_output, timestep, sample, *args, stock=stock, seen=seen, **options):
            seen.append(sample)
            return stock(self, model_output, timestep, sample, *args, **options)

        push = Push()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scheduler, "step", step)
            if name == "stock":
                run(pipe, options)
            else:
                with push.attach(pipe) as guided:
                    run(pipe, options)
    assert guided.guided == [(0, 1)] and len(samples["stock"]) == len(samples["moved"]) == 6
    (by,) = push.made
    for number in (2, 3):
        change = samples["moved"][number] - samples["stock"][number]
        torch.testing.assert_close(change, by.expand_as(change), rtol=1e-4, atol=1e-3)
