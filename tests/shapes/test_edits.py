"""The proof of the editor: on edits whose right answer is known, and every arm through the whole evaluation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from cvg_kernels.cli.main import main  # noqa: E402
from cvg_kernels.shapes.edit_arms import sdedit_arms  # noqa: E402
from cvg_kernels.shapes.edit_encoders import contents, measure_encoders  # noqa: E402
from cvg_kernels.shapes.edit_tasks import edit_tasks, judge_edit  # noqa: E402
from cvg_kernels.shapes.edits import KINDS, evaluate_edits, groups, print_edits  # noqa: E402
from cvg_kernels.shapes.model import build_scheduler  # noqa: E402
from cvg_kernels.shapes.pipeline import load_pipeline  # noqa: E402
from cvg_kernels.shapes.world import COLOURS, HELD_OUT, Scene, render  # noqa: E402
from tests.editing.tiny import tiny_editor  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


#: Pixels. The oracle's centre is the mean of an object's pixels: of a triangle of radius r it lies 0.27 r below the
#: place that the triangle is drawn around, and r is at most 9; and pixels are whole.
FAR = 0.27 * 9 + 0.75


def fresh_seed() -> int:
    """From torch's generator, which each test has of its own."""
    return int(torch.randint(2**31, ()))


def drawn(task, shift=0.0, reverse=False, things=None):
    """The clip that a perfect editor makes; moved by `shift` pixels, or run backwards."""
    motions = tuple(
        replace(m, centres=(m.centres[::-1] if reverse else m.centres) + np.array([shift, 0.0]))
        for m in task.scene.motions
    )
    return render([Scene(things or task.asked, motions)])[0]


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("things", [1, 2])
def test_a_perfect_edit_has_the_content_and_the_places(things):
    for task in edit_tasks(12, fresh_seed(), things=things):
        found = judge_edit(drawn(task), task)
        assert (found.colour, found.shape, found.direction, found.found) == (1, 1, 1, 1)
        assert found.distance < FAR


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("things", [1, 2])
def test_the_untouched_clip_has_the_places_and_none_of_the_content(things):
    for task in edit_tasks(12, fresh_seed(), things=things):
        found = judge_edit(task.clip, task)
        assert (found.colour, found.shape, found.direction, found.found) == (0, 0, 1, 1)
        assert found.distance < FAR


@pytest.mark.drawn(8, of="long tests")
def test_a_shift_is_its_pixels_and_a_clip_run_backwards_has_the_other_direction():
    for task in edit_tasks(12, fresh_seed()):
        # towards the middle, so that nothing leaves the picture
        middle = task.scene.motions[0].centres[:, 0].mean()
        shift = 4.0 if middle < 32 else -4.0
        there, moved = (judge_edit(drawn(task, by), task) for by in (0.0, shift))
        assert abs(moved.distance - 4) <= there.distance + 0.5
        assert judge_edit(drawn(task, reverse=True), task).direction == 0


def test_an_edit_that_shows_nothing_is_lost_and_has_no_distance():
    task = edit_tasks(1, fresh_seed())[0]
    found = judge_edit(torch.full((8, 3, 64, 64), 0.08), task)
    assert (found.colour, found.found, found.distance) == (0, 0, None)
    two = edit_tasks(1, fresh_seed(), things=2)[0]
    half = Scene(two.asked[:1], two.scene.motions[:1])
    assert judge_edit(render([half])[0], two).found == 0.5


def test_tasks_ask_for_another_colour_and_shape_and_are_drawn_one_by_one():
    seed = fresh_seed()
    for held_out in (False, True):
        tasks = edit_tasks(8, seed, things=2, held_out=held_out)
        for task, again in zip(tasks, edit_tasks(3, seed, things=2, held_out=held_out), strict=False):
            assert torch.equal(task.clip, again.clip) and task.prompt == again.prompt
        for task in tasks:
            asked = {(thing.colour, thing.shape) for thing in task.asked}
            assert asked <= HELD_OUT if held_out else not asked & HELD_OUT
            before = {thing.colour for thing in task.scene.things}
            assert not before & {thing.colour for thing in task.asked}
            assert all(a.shape != s.shape for a, s in zip(task.asked, task.scene.things, strict=True))
            moving = task.prompt_with_motion
            assert [word for word in moving.split() if word in ("left", "right", "up", "down")] == [
                thing.direction for thing in task.scene.things
            ]


@pytest.mark.drawn(8, of="whole trainings")
def test_every_arm_runs_and_a_report_has_them_all(monkeypatch, capsys):
    monkeypatch.setattr("cvg_kernels.shapes.edit_arms.STEPS", 1)
    monkeypatch.setattr("cvg_kernels.shapes.edit_arms.LEVELS", (0, 2))
    monkeypatch.setattr("cvg_kernels.shapes.edit_arms.TEMPORAL_SCALES", (1.5,))
    pipe, other = tiny_editor(), tiny_editor(seed=1)
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    calls: list[int] = []
    measured = groups(
        pipe,
        load_pipeline(),
        edits=2,
        seed=fresh_seed(),
        diffusion_prior=other.prior,
        prior_scheduler=build_scheduler(),
        denoisers={"other": other.unet},
    )
    measured["SDEdit"] = replace(measured["SDEdit"], arms=sdedit_arms(load_pipeline(), strengths=(1.0,)))
    seen: dict[str, int] = {}
    report = evaluate_edits(measured, model="tiny", seed=0, progress=lambda name, done: seen.update({name: done}))
    assert all(seen[name] == 2 for group in measured.values() for name in group.arms)
    for group, content in measured.items():
        for at, name in enumerate(content.arms):
            entry = report["groups"][group][name]
            assert all(entry[kind]["n"] <= 2 for kind in KINDS)
            assert ("minus_first" in entry) == (at > 0)
    assert pipe.prior is not other.prior and pipe.unet is not other.unet  # put back
    assert "encode_content" not in vars(pipe)
    print_edits(report)
    shown = capsys.readouterr().out
    assert all(name in shown for group in measured.values() for name in group.arms)


@pytest.mark.drawn(8, of="long tests")
def test_encoders_are_measured_against_all_captions():
    assert len(contents(1, held_out=True)) == len(COLOURS) * 4
    assert len(contents(1, held_out=False)) == len(COLOURS) * 4 - len(HELD_OUT)
    found = measure_encoders(tiny_editor(), seed=fresh_seed(), frames=20)
    one, two = found["retrieval"]["one thing"], found["retrieval"]["two things"]
    assert one["captions"] == 20 and two["captions"] == 166
    assert two["text"]["rate"] <= 0.25  # untrained: chance is 1 in 166
    assert found["depth_error"]["things"]["mean"] > 0.05


@pytest.mark.drawn(8, of="long tests")
def test_the_command_names_a_group_that_is_not_there(capsys):
    assert main(["shapes", "edits", "--prompts", "2", "--groups", "colour"]) == 2
    assert "--groups must be of structure, content, time" in capsys.readouterr().err


def test_two_things_may_change_places():
    for task in edit_tasks(6, fresh_seed(), things=2):
        crossed = Scene(task.asked, task.scene.motions[::-1])
        found = judge_edit(render([crossed])[0], task)
        assert (found.colour, found.shape, found.direction, found.found) == (1, 1, 1, 1)
        assert found.distance < FAR
