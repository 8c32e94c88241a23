"""The tiny pipelines are what their cases say: counted and measured with hooks of torch alone."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from tests.offline_pipelines import noise  # noqa: E402
from tests.pipelines import PIPELINES, STEPS, denoisers, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

#: Of those whose latents are stated, which are the ones that most tests run on.
GUIDED = [name for name, case in PIPELINES.items() if case.latents and "uncond" in case.branches]
SHORTENED = [name for name, case in PIPELINES.items() if case.strength < 1]
#: Parts of the names of layers that go over frames alone.
TEMPORAL = ("motion_modules", "temp_attentions", "temporal_transformer_blocks")


@dataclass
class Call:
    """A call of a denoiser."""

    denoiser: torch.nn.Module
    latents: torch.Tensor
    arguments: dict[str, Any]
    output: Any = None


@dataclass
class Recorded:
    calls: list[Call] = field(default_factory=list)
    samples: list[torch.Tensor] = field(default_factory=list)  # that the scheduler stepped from


@contextlib.contextmanager
def recorded(pipe):
    """What goes into the denoiser and comes out, and what the scheduler is asked."""
    found = Recorded()
    scheduler = type(pipe.scheduler)  # the class: some pipelines step copies
    step = scheduler.step

    def enter(module, args, arguments):
        latents = arguments.get("hidden_states", arguments.get("sample"))
        found.calls.append(Call(module, args[0] if latents is None else latents, arguments))

    def leave(module, args, output):
        found.calls[-1].output = output[0]

    def counted(self, model_output, timestep, sample, *args, **options):
        found.samples.append(sample)
        return step(self, model_output, timestep, sample, *args, **options)

    handles = [d.register_forward_pre_hook(enter, with_kwargs=True) for d in denoisers(pipe)]
    handles += [d.register_forward_hook(leave) for d in denoisers(pipe)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "step", counted)
        yield found
    for handle in handles:
        handle.remove()


def inputs_of(options):
    """The names of those that hold images, videos or tensors."""
    firsts = {key: v[0] if isinstance(v, list) and v else v for key, v in options.items()}
    return {key for key, v in firsts.items() if isinstance(v, (Image.Image, torch.Tensor))}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.drawn(14)
def test_a_pipeline_is_what_its_case_says(name):
    case = PIPELINES[name]
    pipe, options = case.build()
    with recorded(pipe) as found:
        frames = run(pipe, options)
    assert frames.isfinite().all() and frames.std() > 0
    assert torch.equal(run(pipe, options), frames)

    asked = options.get("num_inference_steps", STEPS)
    assert len(found.samples) == case.scheduler_steps(asked)
    assert len(found.calls) == case.denoiser_calls(asked)
    assert len({id(call.denoiser) for call in found.calls}) == case.experts
    assert options.get("strength", 1.0) == case.strength
    assert inputs_of(options) == set(case.takes)
    assert (case.task == "text") == (not inputs_of(options) - {"ip_adapter_image_embeds"})

    denoiser = denoisers(pipe)[0]
    base = denoiser.get_base_model() if "peft" in case.needs else denoiser
    assert case.denoiser in [kind.__name__ for kind in type(base).__mro__]
    layers = [layer for layer, _ in denoiser.named_modules()]
    assert any(part in layer for part in TEMPORAL for layer in layers) == case.temporal
    axis = case.channel_axis
    extra = found.calls[0].latents.shape[axis] - found.samples[0].shape[axis]
    assert extra == case.condition_channels
    if case.latents:
        rows = len(case.branches) if case.batched else 1
        want = list(noise(name, pipe, rows).shape)
        want[axis] += extra
        assert {call.latents.shape for call in found.calls} == {torch.Size(want)}


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", SHORTENED)
@pytest.mark.parametrize("asked", [2, 4])
def test_video_to_video_leaves_out_a_share_of_the_schedule(name, asked):
    pipe, options = PIPELINES[name].build()
    with recorded(pipe) as found:
        run(pipe, options, num_inference_steps=asked)
    assert len(found.samples) == PIPELINES[name].scheduler_steps(asked) == int(0.7 * asked)


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.drawn(9)
def test_the_negative_prompt_moves_the_unconditional_branch_alone(name):
    case = PIPELINES[name]
    pipe, options = case.build()
    texts = []
    for changes in ({}, {"negative_prompt": "running"}):
        with recorded(pipe) as found:
            run(pipe, options, **changes)
        seen = [call.arguments["encoder_hidden_states"] for call in found.calls]
        branches = len(case.branches)
        texts.append(seen[0].chunk(branches) if case.batched else seen[:branches])
    moved = [not torch.equal(before, after) for before, after in zip(*texts, strict=True)]
    assert moved == [branch == "uncond" for branch in case.branches]


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", ["animatediff_pag", "animatediff_pag_alone"])
def test_the_perturbed_branch_is_the_last(name):
    pipe, options = PIPELINES[name].build()
    outputs = []
    for scale in (options["pag_scale"], 0.0):
        with recorded(pipe) as found:
            run(pipe, options, pag_scale=scale)
        outputs.append(found.calls[0].output)
    guided, plain = outputs
    *others, perturbed = guided
    torch.testing.assert_close(torch.stack(others), plain)
    assert (perturbed - others[-1]).abs().max() > 1e-4 * others[-1].abs().max()


@pytest.mark.parametrize("name", ["wan_modular", "wan_subclass", "wan_fsdp"])
def test_the_same_pipeline_in_other_clothes(name):
    assert torch.equal(run(PIPELINES[name]), run(PIPELINES["wan"]))


@pytest.mark.drawn(8, of="long tests")
def test_adapters_and_prompts_on_the_way_reach_the_frames():
    plain = run(PIPELINES["animatediff_freenoise"])
    assert not torch.equal(run(PIPELINES["animatediff_freenoise_prompts"]), plain)
    assert not torch.equal(run(PIPELINES["animatediff_freenoise"], {"num_frames": 12}, "a"), plain)
    image = {"ip_adapter_image_embeds": [torch.randn(2, 1, 8)]}
    adapted = PIPELINES["animatediff_ip_adapter"]
    assert not torch.equal(run(adapted, image), run(adapted))


def test_split_inference_changes_nothing_else():
    whole, split = (PIPELINES[f"animatediff_freenoise{end}"] for end in ("", "_split"))
    torch.testing.assert_close(run(split), run(whole))
