"""The editor that ships: it edits, and its dials do what they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.shapes.edit_arms import edit  # noqa: E402
from cvg_kernels.shapes.edit_encoders import depth_error, retrieval  # noqa: E402
from cvg_kernels.shapes.edit_tasks import edit_tasks, judge_edits  # noqa: E402
from cvg_kernels.shapes.editor import WEIGHTS, load_editor  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe():
    return load_editor()


def test_it_is_small_and_says_nothing_of_where_it_was_made():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    texts = [path.read_text() for path in files if path.suffix == ".json"]
    assert texts and not any('"_name_or_path": "/' in text for text in texts)


@pytest.mark.drawn(4, of="shipped weights")
def test_content_changes_and_places_do_not(pipe):
    """Twelve fresh edits: the bounds lie far below the measured rates (benchmarks/results/shapes-edits.json)."""
    tasks = edit_tasks(12, int(torch.randint(2**31, ())))
    found = judge_edits(edit(pipe, tasks, range(12)), tasks)
    assert sum(one.colour for one in found) >= 6
    assert sum(one.found for one in found) >= 8
    assert np.mean([one.distance for one in found if one.distance is not None]) < 5
    assert sum(one.direction for one in found) >= 6


@pytest.mark.drawn(4, of="shipped weights")
def test_another_structure_moves_things_and_another_content_does_not(pipe):
    tasks = edit_tasks(6, int(torch.randint(2**31, ())))
    seeds = range(6)
    base = edit(pipe, tasks, seeds)
    clips = torch.stack([task.clip for task in tasks])
    pictures = torch.stack([task.picture for task in tasks])
    other_structure = edit(pipe, tasks, seeds, video=clips.roll(1, 0))
    other_content = edit(pipe, tasks, seeds, prompt=None, image=pictures.roll(1, 0))

    def places(frames):
        """Where something is."""
        return ((frames - 0.08).abs().amax(2) > 0.25).float()

    def overlap(one, other):
        both, either = (one * other).sum(), torch.maximum(one, other).sum()
        return float(both / either)

    ours = places(base)
    assert overlap(ours, places(other_content)) > 2 * overlap(ours, places(other_structure))


@pytest.mark.drawn(8, of="long tests")
def test_its_encoders_read_the_world(pipe):
    seed = int(torch.randint(2**31, ()))
    assert retrieval(pipe, 1, False, 40, seed)["text"]["rate"] >= 0.9
    assert retrieval(pipe, 2, False, 40, seed)["text"]["rate"] >= 0.8
    assert depth_error(pipe, 20, seed)["pixels"]["mean"] < 0.03


@pytest.mark.drawn(8, of="long tests")
def test_vico_and_capture_take_part_in_an_edit(pipe):
    task = edit_tasks(1, 0)[0]
    words = task.prompt.split()[1:]
    with cvg.Vico(words=words).attach(pipe) as run, cvg.capture(pipe, words=words) as captured:
        frames = edit(pipe, [task], [0])
    assert run.guided_steps > 0 and frames.isfinite().all()
    assert captured.heat_map(words[1]).shape == (8, 8, 8)
