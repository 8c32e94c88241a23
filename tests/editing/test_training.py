"""What the editor learns from, and how: clips, tasks, and the loop that trains its networks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from transformers import CLIPModel  # noqa: E402

from cvg_kernels.editing.content import embed_images  # noqa: E402
from cvg_kernels.editing.structure import structure_channels  # noqa: E402
from cvg_kernels.shapes import edit_latents, train_content  # noqa: E402
from cvg_kernels.shapes.edit_latents import encode_edit_clips, load_edit_clips  # noqa: E402
from cvg_kernels.shapes.pipeline import load_pipeline  # noqa: E402
from cvg_kernels.shapes.train_editor import Editing, widened  # noqa: E402
from cvg_kernels.training.checkpoint import Checkpoint  # noqa: E402
from cvg_kernels.training.fit import fit  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(editor, tmp_path_factory):
    """Five clips, made by one process."""
    folder = tmp_path_factory.mktemp("shards") / "edit-clips"
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # rounded as in the tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edit_latents, "_SHARD", 2)
        encode_edit_clips(folder, editor, seed=3, clips=5)
    torch.set_num_threads(before)
    return folder


@pytest.mark.drawn(8, of="long tests")
def test_clips_are_what_they_are_whoever_makes_them(editor, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(edit_latents, "_SHARD", 2)
    for rank in (1, 0):
        encode_edit_clips(tmp_path, editor, seed=3, clips=5, rank=rank, processes=2)
    one, other = load_edit_clips(shards), load_edit_clips(tmp_path)
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(other, name)), name
    assert one.latents.shape == (5, 8, 4, 8, 8) and one.structures.shape == (5, 2, 8, 4, 8, 8)
    assert one.embeddings.shape == (5, 8, 256) and one.tokens.shape == (5, 2, 16)
    assert (one.levels[:, 0] != one.levels[:, 1]).all() and one.levels.max() <= 7
    assert not torch.equal(one.tokens[:, 0], one.tokens[:, 1])  # without and with the motion


def test_a_widened_denoiser_is_the_old_one_whatever_the_structure():
    denoiser = load_pipeline().unet
    wide = widened(denoiser).eval()
    noisy, text = torch.randn(1, 4, 8, 8, 8), torch.randn(8, 16, 64)
    channels = structure_channels(torch.randn(1, 4, 8, 8, 8), 5)
    with torch.no_grad():
        wanted = denoiser(noisy, 500, text).sample
        found = wide(torch.cat([noisy, channels], 1), 500, text).sample
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize(("share", "frames"), [(0.0, 8), (1.0, 1)])
def test_the_task_is_on_clips_or_on_single_frames_without_time(editor, shards, share, frames):
    task = Editing(load_edit_clips(shards), editor.text_encoder, editor.tokenizer, share)
    seen, timed = [], []
    hooks = [
        editor.unet.register_forward_pre_hook(lambda _, args: seen.append(args)),
        editor.unet.down_blocks[0].motion_modules[0].proj_in.register_forward_hook(lambda *_: timed.append(1)),
    ]
    loss = task(editor.unet, np.random.default_rng(0))
    loss.backward()
    for hook in hooks:
        hook.remove()
    (noisy, timesteps, text) = seen[0]
    assert noisy.shape[1:] == (12, frames, 8, 8) and text.shape[1:] == (20, 64)
    assert len(text) == len(noisy) * frames and timesteps.min() >= 0 and timesteps.max() < 1000
    assert bool(timed) == (frames > 1)
    assert all(p.grad is None for p in editor.text_encoder.parameters())
    assert editor.unet.conv_in.weight.grad[:, 4:].any()
    editor.unet.zero_grad(set_to_none=True)


class Stopped(Exception):
    """Stands for a machine that goes away."""


def line(folder, steps=6, **options):
    """Fits a line, from torch's and the step's randomness."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"slope": nn.Linear(2, 1), "other": nn.Linear(1, 1)})

    def loss(model, rng):
        x = torch.randn(4, 2) + torch.from_numpy(rng.normal(size=(4, 2))).float()
        return (model["other"](model["slope"](x)) - x.sum(1, keepdim=True)).square().mean()

    folder.mkdir(exist_ok=True)
    options = {"steps": steps, "seed": 1, "rate": 0.01} | options
    return fit(folder, "line", model, loss, **options)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path, monkeypatch, decay):
    whole = line(tmp_path / "whole", decay=decay).state_dict()
    with monkeypatch.context() as patch:

        def save_then_stop(checkpoint, step):
            if step == 3:
                checkpoint.save(step)
                raise Stopped

        patch.setattr(Checkpoint, "save_sometimes", save_then_stop)
        with pytest.raises(Stopped):
            line(tmp_path / "cut", decay=decay)
    resumed = line(tmp_path / "cut", decay=decay).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_parameters_have_the_rates_of_their_names_and_losses_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("cvg_kernels.training.log._EVERY", 1)
    slow = line(tmp_path, rates={"slope": 0.0})
    torch.manual_seed(0)
    assert torch.equal(slow["slope"].weight, nn.Linear(2, 1).weight)
    lines = [json.loads(each) for each in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in lines] == list(range(1, 7))


@pytest.mark.drawn(8, of="long tests")
def test_a_few_steps_bring_frames_and_their_captions_together(editor, tmp_path, monkeypatch):
    monkeypatch.setattr("cvg_kernels.training.log._EVERY", 1)
    monkeypatch.setattr(train_content, "_BATCH", 32)
    cpu = torch.device("cpu")
    trained = train_content.train_content_encoder(tmp_path, editor.tokenizer, seed=1, steps=16, device=cpu)
    lines = [json.loads(each) for each in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [each["loss"] for each in lines]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.1
    saved = CLIPModel.from_pretrained(tmp_path / "content_encoder", local_files_only=True)
    frames = torch.rand(3, 3, 64, 64)
    embeddings = embed_images(saved, frames)
    assert embeddings.shape == (3, 256) and torch.equal(embeddings, embed_images(trained, frames))
