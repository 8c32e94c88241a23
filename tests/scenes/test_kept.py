"""Judged clips that an evaluation keeps: read back as they were, under a key of all that they were made with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.scenes.kept import Judged, KeptClips, key_of  # noqa: E402
from cvg_kernels.scenes.verdict import Verdict  # noqa: E402

CLIPS = {
    "one": Judged(Verdict(("right", "dropped"), None, 1), 0.1 + 0.2, 3.5),
    "two": Judged(Verdict(("merged",), False, 0), 0.0, 1e-3),
}


def test_clips_are_read_back_as_they_were(tmp_path):
    path = tmp_path / "clips.jsonl"
    kept = KeptClips(path)
    for key, clip in CLIPS.items():
        assert kept[key] is None
        kept.add(key, clip, prompt="a red circle")
        assert kept[key] == clip
    assert {key: KeptClips(path)[key] for key in CLIPS} == CLIPS
    unkept = KeptClips()
    unkept.add("one", CLIPS["one"])
    assert unkept["one"] == CLIPS["one"] and len(list(tmp_path.iterdir())) == 1


def test_a_line_that_was_cut_off_is_passed_over_and_another_kind_of_file_is_an_error(tmp_path):
    path = tmp_path / "clips.jsonl"
    KeptClips(path).add("one", CLIPS["one"])
    line = path.read_text()
    path.write_text(line[: len(line) // 2])
    kept = KeptClips(path)
    assert kept["one"] is None
    kept.add("two", CLIPS["two"])
    assert KeptClips(path)["two"] == CLIPS["two"]
    path.write_text(line + '{"something": "else"}\n')
    with pytest.raises(ArgumentError, match="line 2 of .*clips.jsonl is not a judged clip"):
        KeptClips(path)
    for other in ("# Notes\n", "[1, 2]\n", "{}\n", line.replace("verdict", "judgement")):
        path.write_text(other)
        with pytest.raises(ArgumentError, match="line 1 of .*clips.jsonl is not a judged clip"):
            KeptClips(path)
        assert path.read_text() == other


def test_the_key_tells_all_that_clips_are_made_with_apart():
    def network(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    weights = int(torch.randint(2**31, ()))
    vico = cvg.Vico(iterations=1)
    parts = [
        (network(weights), vico, {"steps": 2}),
        (network(weights + 1), vico, {"steps": 2}),
        (network(weights).double(), vico, {"steps": 2}),
        (network(weights), cvg.Vico(iterations=2), {"steps": 2}),
        (network(weights), cvg.FlowMo(), {"steps": 2}),
        (network(weights), None, {"steps": 2}),
        (network(weights), vico, {"steps": 3}),
        (network(weights), vico, {"stop": 2}),
        (torch.zeros(2, 3), vico),
        (torch.zeros(3, 2), vico),
        ("ab", "c"),
        ("a", "bc"),
    ]
    keys = [key_of(*each) for each in parts]
    assert len(set(keys)) == len(keys)
    assert key_of(network(weights), cvg.Vico(iterations=1), {"steps": 2}) == keys[0]
