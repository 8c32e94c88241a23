"""Which branch of guidance a denoiser call is, where a pipeline makes more of them, or more videos, than usual."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from tests.pipelines import PIPELINES, PROMPT, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["cat"]


def branches_of(captured: cvg.Capture) -> list[tuple[str, ...]]:
    """The branches of each step in the order of their calls."""
    steps: dict[int, dict[str, None]] = {}
    for record in captured.records:
        steps.setdefault(record.step, {})[record.branch] = None
    assert len(captured.records) == len({(r.step, r.layer, r.branch) for r in captured.records})
    return [tuple(steps[step]) for step in sorted(steps)]


@pytest.mark.parametrize("videos", [2, 3])
def test_videos_that_share_one_text_are_no_branches(videos):
    """Kandinsky 5 makes a call for each branch, and does not repeat the text for the videos of a prompt."""
    pipe, options = PIPELINES["kandinsky5"].build()
    for attached in (cvg.capture(pipe, WORDS), cvg.Vico(words=WORDS).attach(pipe)):
        with pytest.raises(cvg.ArgumentError, match="num_videos_per_prompt must be 1"), attached:
            run(pipe, options, num_videos_per_prompt=videos)
    with cvg.capture(pipe, WORDS) as captured:
        run(pipe, options, [PROMPT] * 2, num_inference_steps=1)
    assert branches_of(captured) == [("cond", "uncond")]
    assert {len(record.maps) for record in captured.records} == {2}


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "disturbed", [{"modality_scale": 2.0}, {"stg_scale": 1.0, "spatio_temporal_guidance_blocks": [0]}]
)
def test_calls_of_ltx2_with_a_disturbed_network(disturbed, guidance_scale):
    """They are no second calls with the prompt: its maps stay those of a run without them."""
    pipe, options = PIPELINES["ltx2"].build()
    options = {**options, "num_inference_steps": 1, "guidance_scale": guidance_scale}
    with cvg.capture(pipe, WORDS) as plain:
        run(pipe, options)
    stock = run(pipe, options, **disturbed)
    with cvg.capture(pipe, WORDS) as captured:
        torch.testing.assert_close(run(pipe, options, **disturbed), stock, rtol=1e-4, atol=1e-4)
    assert branches_of(captured) == [(*branches_of(plain)[0], "perturbed")]
    torch.testing.assert_close(captured.heat_map("cat"), plain.heat_map("cat"))


@pytest.mark.parametrize("negative", ["", PROMPT])
def test_a_guider_that_does_not_count_its_calls(negative):
    """Of smoothed energy guidance `is_conditional` never holds in diffusers:
    its calls are told apart by their text.
    """
    pipe, options = PIPELINES["hunyuan_video15"].build()
    pipe.guider = guider = diffusers.guiders.SmoothedEnergyGuidance(
        seg_guidance_layers=[0], seg_guidance_start=0.0, seg_guidance_stop=1.0
    )
    wanted: list[list[str]] = []
    names = {"pred_cond": "cond", "pred_uncond": "uncond", "pred_cond_seg": "perturbed"}
    stock = guider.prepare_inputs

    def prepare_inputs(*args, **kwargs):
        batches = stock(*args, **kwargs)
        wanted.append([names[getattr(batch, guider._identifier_key)] for batch in batches])
        return batches

    guider.prepare_inputs = prepare_inputs
    with cvg.capture(pipe, WORDS) as captured, cvg.Vico(words=WORDS).attach(pipe) as made:
        run(pipe, options, negative_prompt=negative)
    assert branches_of(captured) == [tuple(step) for step in wanted]
    assert "perturbed" in wanted[-1]
    assert made.guided_steps > 0
