"""The oracle of the world of scenes: right on true clips, on hidden, touching and bordering objects;
blind to noise.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cvg_kernels.scenes.captions import Caption, Thing, parse_caption, random_caption, random_clip
from cvg_kernels.scenes.oracle import connected, look
from cvg_kernels.scenes.verdict import judge
from cvg_kernels.scenes.world import COLOURS, FRAMES, SHAPES, Body, render, render_depth, render_masks

pytestmark = pytest.mark.usefixtures("one_thread")


def body(colour: str, shape: str, x: float, y: float, radius: float = 7.0, way=(0.0, 0.0)) -> Body:
    """An object that is at (x, y) in the middle of the clip and goes `way` in it."""
    path = np.linspace(-0.5, 0.5, FRAMES)[:, None] * np.array(way)
    return Body(colour, shape, radius, np.array([x, y]) + path)


def seen(*bodies: Body) -> set[tuple[str, str | None]]:
    return {(one.colour, one.shape) for one in look(render([bodies])[0])}


@pytest.mark.drawn(8, of="long tests")
def test_it_is_right_on_true_clips():
    """Everything that captions say, on clips nobody chose: 99 % of the captions whole."""
    rng = np.random.default_rng(np.random.randint(2**31))
    captions = [random_caption(rng) for _ in range(60)]
    wrong = []
    for caption in captions:
        found = judge(look(render([random_clip(rng, caption)])[0]), caption)
        if not found.all_right or found.extra or (found.relation is None) != (caption.relation is None):
            wrong.append((str(caption), found))
    assert len(wrong) <= 2, wrong  # 3 of 60 would be one chance in 40 at a true rate of 1 %


def test_another_caption_is_false():
    rng = np.random.default_rng(np.random.randint(2**31))
    for _ in range(15):
        caption, other = random_caption(rng), random_caption(rng)
        pairs = [{(t.colour, t.shape, t.count) for t in one.things} for one in (caption, other)]
        if not pairs[1] <= pairs[0]:
            assert not judge(look(render([random_clip(rng, caption)])[0]), other).all_right


@pytest.mark.parametrize("level", [0.05, 0.5, 2.0])
def test_it_sees_nothing_in_noise(level):
    assert look((0.5 + level * torch.randn(FRAMES, 3, 64, 64)).clamp(0, 1)) == []
    assert look(torch.full((FRAMES, 3, 64, 64), 0.08)) == []


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("corner", [(8.0, 8.0), (55.0, 8.0), (31.5, 55.0)])
def test_at_the_border(shape, corner):
    assert seen(body("green", shape, *corner, radius=6.5)) == {("green", shape)}


@pytest.mark.parametrize("second", SHAPES)
@pytest.mark.parametrize("first", SHAPES)
def test_touching_objects_stay_apart(first, second):
    """Side by side without a free pixel, in colours whose mixture is none of the palette's."""
    pair = body("red", first, 24, 32), body("white", second, 38, 32)
    assert seen(*pair) == {("red", first), ("white", second)}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hidden_part_does_not_change_a_shape(shape):
    """What another covers at a corner, by a fifth of its square, is thought of."""
    behind, front = body("cyan", shape, 28, 28, 7.0), body("red", "square", 36.5, 36.5, 8.5)
    assert seen(behind, front) == {("cyan", shape), ("red", "square")}
    named = (Thing("cyan", shape), Thing("red", "square"))
    found = look(render([(behind, front)])[0])
    assert judge(found, Caption(named, "behind")).relation is True
    assert judge(found, Caption(named[::-1], "behind")).relation is False


def test_kinds_of_failure():
    caption = parse_caption("a red circle and a blue square and a green triangle")
    red, blue, green = (
        body("red", "circle", 14, 14),
        body("blue", "square", 48, 14),
        body("green", "triangle", 30, 46),
    )

    def kinds(*bodies: Body) -> tuple[str, ...]:
        return judge(look(render([bodies])[0]), caption).things

    assert kinds(red, blue, green) == ("right",) * 3
    assert kinds(red, green) == ("right", "dropped", "right")
    assert kinds(red, dataclasses.replace(blue, colour="yellow"), green)[1] == "wrong colour"
    assert kinds(red, dataclasses.replace(blue, shape="cross"), green)[1] == "wrong shape"
    swapped = dataclasses.replace(red, colour="blue"), dataclasses.replace(blue, colour="red")
    assert kinds(*swapped, green) == ("swapped", "swapped", "right")


def test_motion_size_and_number():
    moving = look(render([(body("red", "circle", 32, 32, 5.2, way=(-25, 0)),)])[0])

    def right(text: str) -> bool:
        return judge(moving, parse_caption(text)).all_right

    assert right("a small red circle moving left quickly") and right("a red circle")
    assert not right("a red circle moving right") and not right("a red circle moving left slowly")
    assert not right("a big red circle") and not right("two red circles")
    pair = look(render([(body("red", "circle", 16, 16), body("red", "circle", 46, 46))])[0])
    assert judge(pair, parse_caption("two red circles")).all_right
    assert judge(pair, parse_caption("three red circles")).things == ("wrong count",)


def test_connected_parts():
    mask = torch.zeros(2, 6, 7, dtype=torch.bool)
    mask[0, 0, :3] = mask[0, 1, 3] = True  # joined by a corner
    mask[0, 4:, 5:] = True
    mask[1] = True
    labels = connected(mask)
    assert (labels > 0).equal(mask)
    assert labels[0].unique().numel() == 3 and labels[1].unique().numel() == 1
    assert labels[0, 0, 0] == labels[0, 1, 3] != labels[0, 5, 6]


def test_masks_and_depth_are_of_what_is_seen():
    behind, front = body("cyan", "square", 28, 28, 7.0), body("red", "square", 36.5, 36.5, 8.5)
    masks = render_masks((front, behind))
    depth = render_depth([(front, behind)])[0]
    assert float((masks[0] * masks[1]).max()) < 0.5 and masks.shape == (2, FRAMES, 64, 64)
    assert float(masks[1, 0, 25, 25]) == 1 and float(masks[1, 0, 33, 33]) == 0
    torch.testing.assert_close(float(depth[0, 25, 25]), 7.0 / 9)
    torch.testing.assert_close(float(depth[0, 33, 33]), 8.5 / 9, atol=1e-6, rtol=0)
    assert float(depth[0, 0, 0]) == 0


def test_colours_are_far_apart():
    """No colour of the palette is near a mixture of two others, as a model between two of them makes it."""
    names = list(COLOURS)
    palette = torch.tensor(list(COLOURS.values()))
    for i in range(len(names)):
        for j in range(i):
            middle = (palette[i] + palette[j]) / 2
            others = [k for k in range(len(names)) if k not in (i, j)]
            assert float((palette[others] - middle).norm(dim=1).min()) > 0.3, (names[i], names[j])
