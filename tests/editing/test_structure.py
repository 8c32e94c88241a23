"""Structure maps, their latents and the channels of the level."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.editing.structure import MOST_ROUNDS, structure_channels, structure_latents, structure_maps  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def detail(maps):
    """The mean size of the steps between neighbouring pixels."""
    return float(maps.diff(dim=-1).abs().mean() + maps.diff(dim=-2).abs().mean())


def test_every_round_takes_detail_away_and_the_last_leaves_next_to_none():
    depth = torch.rand(2, 3, 64, 64)
    left = [detail(structure_maps(depth, rounds)) for rounds in range(MOST_ROUNDS + 1)]
    assert all(after < before for before, after in zip(left[:6], left[1:7], strict=True))
    assert left[7] <= left[6] and left[7] < 0.01 * left[0]


def test_they_are_the_rounds_of_the_clips_own_range():
    depth = 5 * torch.rand(2, 4, 20, 28) - 2
    low, high = (depth.flatten(1).min(1)[0], depth.flatten(1).max(1)[0])
    unit = (depth - low.view(2, 1, 1, 1)) / (high - low).view(2, 1, 1, 1)
    for rounds in (0, 2, torch.tensor([1, 5])):
        wanted = cvg.depth_structure(unit, rounds)
        torch.testing.assert_close(structure_maps(depth, rounds), wanted, rtol=0, atol=1e-5)
    same = structure_maps(3 * depth + 7, 2)
    torch.testing.assert_close(same, structure_maps(depth, 2), rtol=0, atol=1e-5)


def test_a_clip_without_depth_is_black_and_finite():
    assert not structure_maps(torch.full((1, 2, 16, 16), 3.0), 2).any()


def test_latents_are_those_of_the_grey_frames(editor):
    maps = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found = structure_latents(editor.vae, maps)
        assert found.shape == (2, 4, 3, 8, 8)
        for clip, frame in ((0, 0), (1, 2)):
            grey = maps[clip, frame].expand(1, 3, 64, 64) * 2 - 1
            wanted = editor.vae.encode(grey).latent_dist.mean[0]
            torch.testing.assert_close(found[clip, :, frame], wanted, rtol=1e-4, atol=1e-4)


def test_channels_of_the_level_tell_all_levels_apart():
    latents = torch.randn(8, 4, 2, 3, 5)
    levels = torch.arange(8)
    channels = structure_channels(latents, levels)
    assert torch.equal(channels[:, :4], latents)
    told = channels[:, 4:]
    assert told.shape == (8, 4, 2, 3, 5)
    assert torch.equal(told, told[:, :, :1, :1, :1].expand_as(told))
    apart = torch.cdist(told[:, :, 0, 0, 0], told[:, :, 0, 0, 0]) + 9 * torch.eye(8)
    assert apart.min() > 0.1
    assert torch.equal(structure_channels(latents, 3)[:, 4:], told[3:4].expand_as(told))
