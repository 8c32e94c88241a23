"""The world of moving shapes, and the oracle that reads it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cvg_kernels.shapes import world
from cvg_kernels.shapes.oracle import judge, look
from cvg_kernels.shapes.world import Thing


def clips(seed: int, count: int, things: int = 2):
    rng = np.random.default_rng(seed)
    scenes = [world.random_scene(rng, world.random_things(rng, things, held_out=None)) for _ in range(count)]
    return scenes, world.render(scenes)


@pytest.mark.drawn(8, of="long tests")
def test_the_oracle_is_right_on_the_truth(request):
    scenes, video = clips(request.config.seed, 100)
    right = [judge(clip, scene.things).all_right for clip, scene in zip(video, scenes, strict=True)]
    assert np.mean(right) >= 0.98


@pytest.mark.drawn(8, of="long tests")
def test_the_oracle_sees_one_object_as_one(request):
    scenes, video = clips(request.config.seed, 40, things=1)
    for clip, scene in zip(video, scenes, strict=True):
        (seen,) = look(clip)
        thing = scene.things[0]
        assert (seen.colour, seen.shape, seen.direction) == (thing.colour, thing.shape, thing.direction)
        np.testing.assert_allclose(seen.centres, scene.motions[0].centres, atol=3.2)  # a triangle's middle lies low


@pytest.mark.parametrize("kind", ["uniform", "normal", "dark", "grey", "stripes"])
def test_the_oracle_sees_nothing_in_noise(kind):
    video = {
        "uniform": torch.rand(8, 3, 64, 64),
        "normal": (0.5 + 0.3 * torch.randn(8, 3, 64, 64)).clamp(0, 1),
        "dark": torch.zeros(8, 3, 64, 64),
        "grey": torch.full((8, 3, 64, 64), 0.5),
        "stripes": (torch.arange(64) % 2).float().expand(8, 3, 64, 64),
    }[kind]
    assert look(video) == []
    things = (Thing("red", "circle", "left"), Thing("blue", "square", "up"))
    verdict = judge(video, things)
    assert not (verdict.present or verdict.bound or verdict.direction or verdict.all_right)


def test_what_is_wrong_is_called_wrong(request):
    """One changed word at a time: the verdict says which part is not true."""
    rng = np.random.default_rng(request.config.seed)
    things = (Thing("red", "circle", "left"), Thing("blue", "square", "up"))
    clip = world.render([world.random_scene(rng, things)])[0]

    def says(*asked: Thing) -> tuple[bool, bool, bool]:
        verdict = judge(clip, asked)
        assert verdict.all_right == (verdict.present and verdict.bound and verdict.direction)
        return verdict.present, verdict.bound, verdict.direction

    other = things[1]
    assert says(*things) == (True, True, True)
    assert says(Thing("red", "circle", "right"), other) == (True, True, False)
    assert says(Thing("red", "triangle", "left"), other) == (True, False, True)
    assert says(Thing("green", "circle", "left"), other) == (True, False, False)  # a circle, not green
    assert says(Thing("green", "cross", "left"), other) == (False, False, False)
    assert says(things[0], Thing("blue", "circle", "up")) == (True, False, True)


def test_swapped_shapes_are_not_bound(request):
    rng = np.random.default_rng(request.config.seed)
    shown = (Thing("red", "square", "left"), Thing("blue", "circle", "up"))
    clip = world.render([world.random_scene(rng, shown)])[0]
    verdict = judge(clip, (Thing("red", "circle", "left"), Thing("blue", "square", "up")))
    assert verdict.present and not verdict.bound and verdict.direction


def test_objects_stay_inside_and_apart(request):
    scenes, _ = clips(request.config.seed, 100)
    for scene in scenes:
        for motion in scene.motions:
            assert (motion.centres - motion.radius >= 0).all()
            assert (motion.centres + motion.radius <= world.SIZE - 1).all()
        one, other = scene.motions
        gap = np.abs(one.centres - other.centres).max(1)
        assert (gap > one.radius + other.radius).all()


def test_training_never_shows_a_held_out_pair(request):
    rng = np.random.default_rng(request.config.seed)
    for _ in range(500):
        scene = world.random_scene(rng)
        assert not {(t.colour, t.shape) for t in scene.things} & world.HELD_OUT
    assert len(world.pairs(held_out=True)) == len(world.HELD_OUT)
    assert len(world.pairs(held_out=False)) == 24 - len(world.HELD_OUT)


def test_captions_are_read_back(request):
    rng = np.random.default_rng(request.config.seed)
    for count in (1, 2):
        things = world.random_things(rng, count, held_out=None)
        assert world.parse_caption(world.caption(things)) == things
    with pytest.raises(ValueError, match="a pink circle moving left"):
        world.parse_caption("a pink circle moving left")


def test_a_seed_is_a_clip():
    (one,), first = clips(5, 1)
    (other,), second = clips(5, 1)
    assert one.caption == other.caption
    assert torch.equal(first, second)


def test_what_is_nearer_looks_larger_and_hides_what_is_farther():
    far = world.Motion(6.5, np.array([[30.0, 32.0]]))
    near = world.Motion(9.0, np.array([[34.0, 32.0]]))
    things = (Thing("red", "square", None), Thing("blue", "square", None))
    assert far.nearness == pytest.approx(6.5 / 9) and near.nearness == 1
    for order in ((0, 1), (1, 0)):
        motions = [(far, near)[at] for at in order]
        scene = world.Scene(tuple(things[at] for at in order), tuple(motions))
        frame, depth = world.render([scene])[0, 0], world.render_depth([scene])[0, 0]
        assert torch.allclose(frame[:, 32, 34], torch.tensor(world.COLOURS["blue"]))  # where both are
        assert torch.allclose(frame[:, 32, 25], torch.tensor(world.COLOURS["red"]))
        assert depth[32, 34] == 1 and depth[32, 25] == pytest.approx(6.5 / 9) and depth[5, 5] == 0


def test_depth_has_the_outlines_of_the_frames(request):
    rng = np.random.default_rng(request.config.seed)
    scenes = [world.random_scene(rng, apart=False) for _ in range(6)]
    frames, depth = world.render(scenes), world.render_depth(scenes)
    assert depth.shape == (6, 8, 64, 64)
    ground = (frames - 0.08).abs().amax(2) < 1e-6
    assert torch.equal(depth == 0, ground)
    assert depth.max() <= 1


def test_things_that_need_not_be_apart_sometimes_overlap_and_are_mostly_seen(request):
    overlaps, generator = 0, np.random.default_rng(request.config.seed)
    pair = (Thing("red", "circle", "left"), Thing("blue", "square", "up"))
    for _ in range(60):
        one, other = world.random_scene(generator, pair, apart=False).motions
        gap = np.abs(one.centres - other.centres).max(1)
        overlaps += bool((gap < one.radius + other.radius).any())
        assert (gap > max(one.radius, other.radius)).mean() >= 0.5
    assert overlaps > 0  # each has a chance of more than a half


def test_captions_may_leave_the_motion_out_where_that_is_said():
    text = "a red circle and a blue square moving up"
    still, moving = world.parse_caption(text, motion=False)
    assert still.direction is None and moving.direction == "up" and world.caption([still, moving]) == text
    with pytest.raises(ValueError, match="moving DIRECTION"):
        world.parse_caption(text)
    for wrong in ("a red circle moving", "a red circle moving around", "red circle", "a red dot"):
        with pytest.raises(ValueError, match=r"\[moving DIRECTION\]"):
            world.parse_caption(wrong, motion=False)


def test_pictures_of_things_apart_are_those_of_any_order(request):
    """No thing hides another: the picture is the ground and what each adds to it."""
    scenes, frames = clips(request.config.seed, 4)
    for scene, clip in zip(scenes, frames, strict=True):
        alone = [
            world.render([world.Scene((thing,), (motion,))])[0] - world.BACKGROUND
            for thing, motion in zip(scene.things, scene.motions, strict=True)
        ]
        torch.testing.assert_close(clip, world.BACKGROUND + sum(alone), rtol=0, atol=1e-6)
