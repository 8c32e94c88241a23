"""Files of prompts for `cvg-kernels generate --prompts`: text, one prompt a line, or JSON Lines with settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cvg_kernels.errors import ArgumentError, nearest
from cvg_kernels.generate import Job
from cvg_kernels.reading import parse_json, read_bytes, text_of

_NUMBER = (int, float)
_TEXT = (str, type(None))
#: What a line may set → the types it takes.
_SETTINGS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "words": (str, list),
    "guidance": _TEXT,
    "model": _TEXT,
    "negative_prompt": _TEXT,
    "seed": (int,),
    "steps": (int,),
    "frames": (int,),
    "height": (int, type(None)),
    "width": (int, type(None)),
    "guidance_scale": _NUMBER,
    "dtype": (str,),
}
_SLUG = 40  # characters of the prompt in the name of a folder


@dataclass(frozen=True)
class Item:
    """A prompt of a file.

    Attributes:
        line: where it stands, from 1.
        key: key of its settings; the same wherever the line stands. Lines that are equal are told apart by a number.
        job: what is asked for; its output is the folder for the results.
    """

    line: int
    key: str
    job: Job

    @property
    def settings(self) -> dict[str, Any]:
        """What the clip depends on, as plain data."""
        return settings_of(self.job)


def settings_of(job: Job) -> dict[str, Any]:
    """Returns what a clip depends on: everything of a job but where it runs and where it is written."""
    return {name: value for name, value in asdict(job).items() if name not in ("output", "device")}


def read_prompts(path: Path, defaults: Job) -> list[Item]:
    """Reads a file of prompts.

    A file whose lines begin with a brace, or whose name ends in `.jsonl`, is JSON Lines: an object a line, with a
    `prompt` and any of `words`, `seed`, `guidance`, `model`, `negative_prompt`, `steps`, `frames`, `height`, `width`,
    `guidance_scale` and `dtype`. Anything else is text, a prompt a line. Blank lines, and in text those that begin
    with `#`, are left out.

    Args:
        path: path of the file, UTF-8.
        defaults: what lines do not set; its output is the folder in which each prompt gets a folder.

    Raises:
        ArgumentError: for a file that cannot be read, holds no prompt, or has a line that cannot be understood.
    """
    try:
        text = text_of(read_bytes(path, pipes=True), path)
    except (OSError, ArgumentError) as error:
        raise ArgumentError(f"--prompts {path} cannot be read: {error}") from None
    lines = re.split(r"\r\n|\n|\r", text)  # no others: a string of JSON may hold U+2028
    entries = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    structured = path.suffix.lower() in (".jsonl", ".ndjson") or entries[:1] and entries[0][1][0] == "{"
    jobs = []
    for number, line in entries:
        if structured:
            given = _object(line, f"{path}, line {number}")
        elif line.startswith("#"):
            continue
        else:
            given = {"prompt": line}
        jobs.append((number, replace(defaults, **given)))
    if not jobs:
        raise ArgumentError(f"--prompts must hold a prompt, got {path} with none")
    return _items(jobs, defaults.output)


def _object(line: str, where: str) -> dict[str, Any]:
    """The settings of a line of JSON."""
    try:
        given = parse_json(line, where)
    except ArgumentError as error:
        raise ArgumentError(f"{where}: must be a JSON object, got {line[:60]!r} ({error})") from None
    if not isinstance(given, dict):
        raise ArgumentError(f"{where}: must be a JSON object, got {line[:60]!r}")
    if unknown := sorted(set(given) - set(_SETTINGS)):
        raise ArgumentError(
            f"{where}: takes {', '.join(_SETTINGS)}; got {', '.join(map(repr, unknown))}"
            f"{nearest(unknown[0], _SETTINGS)}"
        )
    if "prompt" not in given:
        raise ArgumentError(f"{where}: must have a prompt, got {line[:60]!r}")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, _SETTINGS[name]):
            kinds = " or ".join(_json_name(kind) for kind in _SETTINGS[name])
            raise ArgumentError(f"{where}: {name} must be {kinds}, got {value!r}")
    if "words" in given:
        given["words"] = _words(given["words"], where)
    if "guidance_scale" in given:
        given["guidance_scale"] = float(given["guidance_scale"])
    return given


def _words(given: str | list, where: str) -> list[Any]:
    """Words as a list, or separated by commas; a pair is a word and which of several it is."""
    if isinstance(given, str):
        return [word.strip() for word in given.split(",") if word.strip()]
    words: list[Any] = []
    for word in given:
        pair = isinstance(word, list) and [type(part) for part in word] == [str, int]
        if not (pair or isinstance(word, str)):
            raise ArgumentError(f"{where}: a word must be text or [text, which], got {word!r}")
        words.append(tuple(word) if pair else word)
    return words


def _json_name(kind: type) -> str:
    """What JSON calls a type."""
    names = {str: "text", list: "a list", int: "an integer", float: "a number"}
    return names.get(kind, "null")


def _items(jobs: list[tuple[int, Job]], folder: Path) -> list[Item]:
    """Gives each job its key and its folder, which go by what is asked for and not by the line it stands in."""
    items, met = [], Counter()
    for number, job in jobs:
        text = json.dumps(settings_of(job), sort_keys=True)
        met[text] += 1
        key = hashlib.sha256(f"{met[text]} {text}".encode()).hexdigest()[:12]
        slug = re.sub(r"\W+", "-", job.prompt.lower()).strip("-")[:_SLUG].strip("-")
        name = "-".join(part for part in (slug, key) if part)
        items.append(Item(number, key, replace(job, output=folder / name)))
    return items
