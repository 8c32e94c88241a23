"""Image quality of clips, and what a sweep writes: quality measures fall where clips get worse, and only there."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from cvg_kernels.cli import main  # noqa: E402
from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.intervals import mean, paired_difference  # noqa: E402
from cvg_kernels.shapes.evaluation import two_object_prompts  # noqa: E402
from cvg_kernels.shapes.oracle import look  # noqa: E402
from cvg_kernels.shapes.pipeline import load_pipeline  # noqa: E402
from cvg_kernels.shapes.quality import (  # noqa: E402
    encoder_features,
    encoder_frechet,
    frechet,
    object_distance,
    real_clips,
    reconstruct,
)
from cvg_kernels.shapes.sweep import numbers, specifications  # noqa: E402
from cvg_kernels.shapes.world import COLOURS, SHAPES, Thing  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def vae():
    return load_pipeline().vae


def distances(clips: torch.Tensor) -> list[float | None]:
    return [object_distance(clip, look(clip)) for clip in clips]


@pytest.mark.drawn(8, of="long tests")
def test_rendered_objects_are_clean(request):
    found = distances(real_clips(two_object_prompts(12, request.config.seed), request.config.seed))
    assert max(found) < 0.04 and np.mean(found) < 0.015


@pytest.mark.parametrize("shape", SHAPES)
def test_every_outline_and_a_neighbour_fit(shape):
    """Drawn where and as large as it is; another object in the box is part of the drawing."""
    clip = real_clips([(Thing("red", shape, "left"),)], seed=3)[0]
    assert object_distance(clip, look(clip)) < 0.02
    close = clip.clone()
    y, x = (int(c.float().mean()) for c in torch.nonzero(clip[4, 0] > 0.5, as_tuple=True))
    left = x - 22 if x > 40 else x + 12  # ten pixels wide, its edge in the box of the other
    close[:, :, max(y - 5, 0) : y + 5, left : left + 10] = torch.tensor(COLOURS["blue"])[:, None, None]
    seen = look(close[4:5])
    assert {one.colour for one in seen} == {"red", "blue"}
    both = object_distance(close[4:5], seen)
    alone = object_distance(close[4:5], [one for one in seen if one.colour == "red"])
    assert both < 0.06 and both < alone


@pytest.mark.drawn(8, of="long tests")
def test_worse_pictures_are_farther_from_clean(request):
    seed = request.config.seed
    clips = real_clips(two_object_prompts(6, seed), seed)
    clean = np.mean(distances(clips))
    noisy = [np.mean(distances((clips + s * torch.randn_like(clips)).clamp(0, 1))) for s in (0.05, 0.1)]
    blurred = avg_pool2d(clips.flatten(0, 1), 5, 1, 2).view_as(clips)
    assert clean + 0.015 < noisy[0] < noisy[1] - 0.015
    assert np.mean(distances(blurred)) > clean + 0.02


def test_what_the_oracle_cannot_name_is_drawn_as_the_best_outline():
    clip = real_clips([(Thing("red", "cross", "up"),)], seed=1)[0]
    seen = look(clip)
    unnamed = [replace(one, shape=None) for one in seen]
    assert object_distance(clip, unnamed) == object_distance(clip, seen)
    wrong = [replace(one, shape="square") for one in seen]
    assert object_distance(clip, wrong) > object_distance(clip, seen) + 0.05
    off = [replace(one, colour="blue") for one in seen]
    assert object_distance(clip, off) > object_distance(clip, seen) + 0.05


def test_frames_without_the_object_count_nothing():
    clip = real_clips([(Thing("white", "circle", "right"),)], seed=2)[0]
    (seen,) = look(clip)
    half = replace(seen, centres=np.where(np.arange(8)[:, None] < 4, seen.centres, np.nan))
    assert object_distance(clip, [half]) == pytest.approx(object_distance(clip[:4], look(clip[:4])))
    assert object_distance(torch.rand(8, 3, 64, 64), []) is None


def test_frechet_is_that_of_the_fitted_normals():
    """Against the closed form for commuting covariances: |m₁ − m₂|² + Σ (σ₁ − σ₂)²."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    white = rng.normal(size=(400, 5))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    one, other = rng.uniform(0.1, 3, (2, 5))
    shift = rng.normal(size=5)
    found = frechet((white * one) @ basis.T, (white * other) @ basis.T + shift)
    assert found == pytest.approx(shift @ shift + ((one - other) ** 2).sum())
    assert frechet(white, white) == pytest.approx(0, abs=1e-6)


def test_encoder_features_are_pooled_latents(vae):
    clips = real_clips(two_object_prompts(2, 5), 5)
    found = encoder_features(vae, clips)
    z = vae.encode(clips[1] * 2 - 1).latent_dist.mean.detach().double() * vae.config.scaling_factor
    assert found.shape == (2, 6 * z.shape[1]) and found.dtype == torch.float64
    space = torch.stack([z[:, :, row, column] for row in range(8) for column in range(8)], -1)
    moved = space[1:] - space[:-1]
    want = [
        pool(series)
        for series in (space.mean(-1), space.std(-1), moved.std(-1))
        for pool in (lambda s: s.mean(0), lambda s: s.std(0))
    ]
    torch.testing.assert_close(found[1], torch.cat(want), rtol=1e-5, atol=1e-5)


@pytest.mark.drawn(8, of="long tests")
def test_encoder_frechet_orders_sets_of_clips(vae):
    """Another real set is near, through the autoencoder too; frozen, dark and noisy sets are far."""
    things = two_object_prompts(24, 7)
    real = encoder_features(vae, real_clips(things, 7))
    other = real_clips(things, 7, draw=1)
    sets = {
        "other": other,
        "decoded": reconstruct(vae, other),
        "frozen": other[:, :1].expand_as(other),
        "dark": 0.5 * other,
        "noise": torch.rand_like(other),
    }
    found = {name: encoder_frechet(encoder_features(vae, clips), real) for name, clips in sets.items()}
    for entry in found.values():
        assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
    assert max(found["other"]["value"], found["decoded"]["value"]) < 0.1
    for name in ("frozen", "dark", "noise"):
        assert found[name]["ci95"][0] > 2 * max(found["other"]["ci95"][1], found["decoded"]["ci95"][1]), name
    assert encoder_frechet(real, real)["value"] == pytest.approx(0, abs=1e-6)


def test_means_leave_out_what_was_not_seen():
    found = mean([1.0, None, 3.0])
    assert (found["mean"], found["n"]) == (2.0, 2) and found["ci95"][0] < 2 < found["ci95"][1]
    assert mean([None, 1.0]) == {"mean": None, "ci95": None, "n": 1}
    difference = paired_difference([1.0, None, 3.0, 5.0], [2.0, 4.0, 5.0, None])
    assert difference["difference"] == 1.5


@pytest.mark.drawn(8, of="long tests")
def test_sweep_writes_a_report_like_that_of_eval(tmp_path, capsys):
    path = tmp_path / "sweep.json"
    command = "shapes sweep --option step_size --values 0,0.3 --prompts 2 --steps 3 --json"
    assert main([*command.split(), str(path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert (report["method"], report["option"], report["values"]) == ("cvg", "step_size", [0, 0.3])
    assert (report["prompts"], report["seed"]) == (2, 21)
    assert list(report["guidance"]) == ["cvg:step_size=0", "cvg:step_size=0.3"]
    assert set(report["real"]) == {"object_distance", "encoder_frechet"}
    for name, entry in report["guidance"].items():
        assert name in printed and entry["direction"]["n"] == 2
        assert set(entry["object_distance"]) == {"mean", "ci95", "n"}
        assert set(entry["encoder_frechet"]) == {"value", "ci95"}
    values = [entry["encoder_frechet"]["value"] for entry in report["guidance"].values()]
    assert values[0] != values[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--option step_size --values 0,much", "values must be numbers separated by commas, got '0,much'"),
        ("--option step_size --values 1,1.0", "values must differ, got 1, 1.0"),
        ("--option pace --values 1", "guidance 'cvg' takes option=value with the options start, stop, checkp"),
        ("--method none --option steps --values 1", "guidance 'none' takes option=value"),
        ("--option steps --values -1", "steps must be a whole number of at least 0, got -1"),
        ("--option stop --values 0.1,-1", "stop must be a finite number in [0, 1], got -1"),
    ],
)
def test_sweep_says_what_is_wrong(arguments, message, capsys):
    assert main(["shapes", "sweep", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_sweeps_name_methods_with_options_and_combinations():
    assert numbers("0,0.5,1e-2") == [0, 0.5, 0.01] and isinstance(numbers("4")[0], int)
    assert specifications("vico+cvg:steps=4", "step_size", [0.1]) == ["vico+cvg:steps=4:step_size=0.1"]
    with pytest.raises(ArgumentError, match="must differ"):
        specifications("cvg", "steps", [1, 1])
