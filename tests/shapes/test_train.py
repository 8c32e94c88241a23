"""Training: every stage runs, stops and goes on, and ends in a stock pipeline."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.shapes import train as training  # noqa: E402
from cvg_kernels.shapes.edit_stages import trained_otherwise  # noqa: E402
from cvg_kernels.shapes.editor import load_editor  # noqa: E402
from cvg_kernels.shapes.model import build_autoencoder, build_tokenizer, fold_latent_scale  # noqa: E402
from cvg_kernels.shapes.pipeline import load_pipeline, sample  # noqa: E402
from cvg_kernels.shapes.train import Recipe, train  # noqa: E402
from cvg_kernels.training.checkpoint import Checkpoint  # noqa: E402
from tests.shapes.files import written_for_all  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TINY = Recipe(
    autoencoder_steps=2,
    clips=6,
    image_steps=2,
    video_steps=2,
    content_steps=2,
    depth_steps=2,
    edit_clips=6,
    prior_steps=2,
    editor_steps=2,
    comparison_steps=2,
)
STAGES = (
    *("autoencoder", "images", "video"),
    *("content", "depth", "prior", "editor", "diffusion-prior", "ablation-joint", "ablation-video"),
)


def small_batches_by(patch):
    """The same networks, a few samples a step."""
    patch.setattr(training, "IMAGES", replace(training.IMAGES, samples=2))
    patch.setattr(training, "VIDEO", replace(training.VIDEO, samples=1))
    for batch in ("autoencoder._BATCH", "content._BATCH", "depth._BATCH", "prior._BATCH"):
        patch.setattr(f"cvg_kernels.shapes.train_{batch}", 2)
    patch.setattr("cvg_kernels.shapes.train_editor._CLIPS", 2)
    patch.setattr("cvg_kernels.shapes.train_editor._IMAGES", 4)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    small_batches_by(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that was finished once."""
    folder = tmp_path_factory.mktemp("run") / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # rounded as in the tests
    with pytest.MonkeyPatch.context() as patch:
        small_batches_by(patch)
        patch.setattr("cvg_kernels.training.log._EVERY", 1)
        train(folder, TINY, device=CPU)
    torch.set_num_threads(before)
    return folder


@pytest.mark.drawn(8, of="whole trainings")
def test_training_ends_in_a_stock_pipeline(run):
    from diffusers import AnimateDiffPipeline

    folder = run / "pipeline"
    pipe = load_pipeline(folder)
    assert type(pipe) is AnimateDiffPipeline and written_for_all(folder)
    clip = sample(pipe, ["a red circle moving left"], [0], steps=1)
    assert clip.shape == (1, 8, 3, 64, 64) and torch.isfinite(clip).all()


@pytest.mark.drawn(8, of="whole trainings")
def test_training_ends_in_an_editor_that_has_the_networks_of_its_run(run):
    editor = load_editor(run / "pipeline" / "editor")
    world = load_pipeline(run / "pipeline")
    for part in ("vae", "text_encoder"):
        ours, theirs = (getattr(pipe, part).state_dict() for pipe in (editor, world))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    trained = load_file(run / "editor-unet" / "diffusion_pytorch_model.safetensors")
    kept = editor.unet.state_dict()
    assert all(torch.equal(kept[name], weight.half().float()) for name, weight in trained.items())
    made = editor(video=torch.rand(8, 3, 64, 64), prompt="a red circle", num_inference_steps=1, output_type="pt")
    assert made.frames.shape == (1, 8, 3, 64, 64) and torch.isfinite(made.frames).all()
    stored = [path.read_text() for path in (run / "pipeline" / "editor").rglob("*.json")]
    assert stored and not any(str(run) in text for text in stored)


@pytest.mark.drawn(8, of="long tests")
def test_what_is_trained_otherwise_is_found_and_differs(run, tmp_path):
    found = trained_otherwise(run)
    assert set(found["denoisers"]) == {"joint", "video"} and found["prior_scheduler"] is not None
    joint, video = (found["denoisers"][name].state_dict() for name in ("joint", "video"))
    assert any(not torch.equal(joint[name], video[name]) for name in joint)
    with pytest.raises(ArgumentError, match="training run must hold diffusion-prior"):
        trained_otherwise(tmp_path)


class Stopped(Exception):
    """Stands for a machine that goes away."""


@pytest.mark.drawn(8, of="whole trainings")
def test_a_stopped_run_goes_on_as_it_would_have(run, tmp_path):
    """Stopped after the first video step, then resumed: the same weights as without the stop."""
    whole = run / "pipeline"

    def save_then_stop(checkpoint, step):
        if checkpoint.path.stem == "video":
            checkpoint.save(step)
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "save_sometimes", save_then_stop)
        with pytest.raises(Stopped):
            train(tmp_path / "stopped", TINY, device=CPU)
    assert not (tmp_path / "stopped" / "video").exists()
    resumed = train(tmp_path / "stopped", TINY, device=CPU)
    for part in ("unet", "text_encoder", "vae"):
        one, other = (getattr(load_pipeline(f), part).state_dict() for f in (whole, resumed))
        assert all(torch.equal(one[name], other[name]) for name in one), part


@pytest.mark.drawn(8, of="long tests")
def test_a_finished_run_is_left_alone(run):
    weights = run / "video" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    train(run, TINY, device=CPU)
    assert weights.stat().st_mtime_ns == before


@pytest.mark.drawn(8, of="whole trainings")
def test_metrics_are_written(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [stage for stage in STAGES for _ in range(2)]
    assert all(line["loss"] > 0 for line in lines)


@pytest.mark.drawn(44, of="two processes")
def test_two_processes_train_together(tmp_path):
    """The processes are separate programs, with the recipe's own batches; two steps of each stage."""
    folder = train(tmp_path, TINY, device=CPU, processes=2)
    assert all((tmp_path / f"{stage}.safetensors").exists() for stage in STAGES if stage != "autoencoder")
    clip = sample(load_pipeline(folder), ["a red circle moving left"], [0], steps=1)
    assert clip.isfinite().all() and clip.std() > 0


@pytest.mark.parametrize("change", [{"clips": 0}, {"video_steps": -1}])
def test_numbers_are_checked(tmp_path, change):
    with pytest.raises(ArgumentError, match=f"{next(iter(change))} must be positive"):
        train(tmp_path / "run", Recipe(**change), device=CPU)
    assert not (tmp_path / "run").exists()


def test_folding_changes_latents_and_not_pictures():
    autoencoder = build_autoencoder().eval()
    frames = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = torch.randn(4), torch.rand(4) + 0.5
    with torch.no_grad():
        before = autoencoder.encode(frames).latent_dist
        picture = autoencoder.decode(before.mean).sample
        fold_latent_scale(autoencoder, mean, std)
        after = autoencoder.encode(frames).latent_dist
        shape = (1, 4, 1, 1)
        torch.testing.assert_close(
            after.mean, (before.mean - mean.view(shape)) / std.view(shape), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(after.std, before.std / std.view(shape), rtol=1e-4, atol=1e-4)
        # The edge of the picture differs by nothing either: the 1×1 convolution has no padding.
        torch.testing.assert_close(autoencoder.decode(after.mean).sample, picture, rtol=1e-3, atol=1e-3)


def test_the_words_of_the_world_are_single_tokens(tmp_path):
    from cvg_kernels.shapes.world import COLOURS, DIRECTIONS, SHAPES

    tokenizer = build_tokenizer(tmp_path)
    for word in (*COLOURS, *SHAPES, *DIRECTIONS, "a", "and", "moving"):
        assert len(tokenizer.tokenize(word)) == 1, word
    assert len(tokenizer.tokenize("hexagon")) == 7
    assert tokenizer("quiz").input_ids.count(tokenizer.unk_token_id) == 1  # the end token alone
