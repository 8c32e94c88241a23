"""Files of prompts: both forms, what lines may set, and names that go by settings and not by places."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from cvg_kernels.errors import ArgumentError
from cvg_kernels.generate import Job
from cvg_kernels.prompt_file import read_prompts

DEFAULTS = Job("", Path("results"), guidance="gen1", seed=5, words=["cat"])


def _read(tmp_path, text, name="prompts.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_prompts(path, DEFAULTS)


def test_text_is_a_prompt_a_line(tmp_path):
    items = _read(tmp_path, "\ufeffa cat runs\n\n# not this one\n  一只猫在跑  \r\n")
    assert [(item.line, item.job.prompt) for item in items] == [(1, "a cat runs"), (4, "一只猫在跑")]
    assert all(item.job.guidance == "gen1" and item.job.seed == 5 for item in items)


def test_lines_of_json_go_before_what_all_share(tmp_path):
    lines = [
        {"prompt": "a cat", "seed": 7, "words": "a, cat", "guidance": "vico", "model": "some/model"},
        {"prompt": "a cat and a cat", "words": ["a", ["cat", 1]], "guidance_scale": 4, "height": 32},
        {"prompt": "a cat"},
    ]
    first, second, third = _read(tmp_path, "\n".join(map(json.dumps, lines)))
    job = first.job
    assert (job.seed, job.words, job.guidance, job.model) == (7, ["a", "cat"], "vico", "some/model")
    assert second.job.words == ["a", ("cat", 1)] and second.job.height == 32
    assert second.job.guidance_scale == 4.0 and second.job.seed == 5
    assert third.job.words == ["cat"] and third.job.guidance == "gen1"


def test_names_go_by_settings(tmp_path):
    """Lines may be moved and added: what was done is known again; what changed is another piece of work."""
    lines = [f"a cat number {number}" for number in range(5)] + ["a cat number 1"]
    before = _read(tmp_path, "\n".join(lines))
    moved = ["a new one", *lines]
    random.shuffle(moved)
    after = _read(tmp_path, "\n".join(moved))
    assert len({item.key for item in after}) == 7  # equal lines are two pieces of work
    assert {item.key for item in before} < {item.key for item in after}
    assert {item.job.output for item in before} < {item.job.output for item in after}
    other = _read(tmp_path, json.dumps({"prompt": lines[0], "steps": 3}))
    assert other[0].key not in {item.key for item in before}
    assert before[0].job.output.parent == Path("results")


@pytest.mark.parametrize(
    "text, message",
    [
        ("\n# only this\n", "must hold a prompt"),
        ('{"prompt": "a cat"}\n{"prompt": ', "line 2: must be a JSON object"),
        ('{"prompt": "a cat"}\n["a cat"]', "line 2: must be a JSON object"),
        ('{"prompt": "a cat", "sed": 3}', "takes prompt, words, guidance"),
        ('{"prompt": "a cat", "seed": "3"}', "seed must be an integer, got '3'"),
        ('{"prompt": "a cat", "steps": true}', "steps must be an integer, got True"),
        ('{"prompt": "a cat", "words": [3]}', "a word must be text or [text, which], got 3"),
        ('{"prompt": "a cat", "height": 1.5}', "height must be an integer or null, got 1.5"),
        ('{"seed": 3}', "must have a prompt"),
    ],
)
def test_lines_that_cannot_be_understood_are_named(text, message, tmp_path):
    with pytest.raises(ArgumentError, match="prompts.txt") as caught:
        _read(tmp_path, text)
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes("une fl\u00e8che".encode("latin-1"))
    for name in ("nowhere", "latin"):
        with pytest.raises(ArgumentError, match="--prompts .* cannot be read"):
            read_prompts(tmp_path / name, DEFAULTS)
