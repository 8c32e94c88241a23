"""Scores of long clips that change: right on rendered truth, and the command that measures VSTAR's ingredients."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from cvg_kernels.cli import main  # noqa: E402
from cvg_kernels.shapes.long_clips import changing_things, states_shown  # noqa: E402
from cvg_kernels.shapes.oracle import frame_consistency  # noqa: E402
from cvg_kernels.shapes.world import random_scene, render  # noqa: E402


def clip(states, frames=24):
    """The truth: one state drawn after the other."""
    rng = np.random.default_rng(3)
    halves = [render([random_scene(rng, [state], frames // 2)])[0] for state in states]
    return torch.cat(halves)


@pytest.mark.drawn(8, of="long tests")
def test_the_truth_shows_its_states():
    for states in changing_things(6, seed=4):
        assert states[0] != states[1]
        assert states_shown(clip(states), states) == (True, True)
        assert states_shown(clip((states[0], states[0])), states) == (True, False)
        assert states_shown(torch.rand(24, 3, 64, 64), states) == (False, False)


def test_consistency_knows_flicker():
    (states,) = changing_things(1, seed=5)
    steady = clip((states[0], states[0]))[:12]
    flicker = torch.stack([frame if at % 2 else frame.flip(0) for at, frame in enumerate(steady)])
    assert frame_consistency(steady) > 0.9 > frame_consistency(flicker)
    assert frame_consistency(torch.zeros(8, 3, 64, 64)) == 0


@pytest.mark.drawn(8, of="whole trainings")
def test_the_command(tmp_path, capsys):
    path = tmp_path / "long.json"
    few = ["--prompts", "2", "--frames", "9", "--steps", "5"]
    assert main(["shapes", "long", *few, "--json", str(path)]) == 0
    assert "both_states" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert list(report["guidance"]) == ["untouched", "band", "synopsis", "held", "both"]
    banded, untouched = report["guidance"]["band"], report["guidance"]["untouched"]
    assert banded["diagonality"]["mean"] > untouched["diagonality"]["mean"]
    assert set(report["guidance"]["both"]["against_first"]) == {
        "first_state",
        "second_state",
        "both_states",
        "consistency",
        "diagonality",
    }
    assert main(["shapes", "long", "--frames", "1"]) == 2
