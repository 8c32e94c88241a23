"""Judged clips in a file: an evaluation that was stopped goes on, and one of more methods makes no clip twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cvg_kernels.errors import ArgumentError
from cvg_kernels.reading import parse_json, read_bytes, text_of
from cvg_kernels.scenes.verdict import FAILURES, Verdict
from cvg_kernels.writing import append_line


@dataclasses.dataclass(frozen=True)
class Judged:
    """One clip, judged.

    Attributes:
        verdict: what the oracle says of it.
        change: how much neighbouring frames differ, mean over pixels, in [0, 1].
        seconds: how long it took to make, its share of its batch.
    """

    verdict: Verdict
    change: float
    seconds: float

    def scores(self) -> dict[str, float | None]:
        """Shares of the things named, by how they ended; whether relation and all are right; how much moves."""
        ends = Counter(self.verdict.things)
        shares = {kind: ends[kind] / len(self.verdict.things) for kind in ("right", *FAILURES)}
        relation = self.verdict.relation
        return {
            "shown": sum(self.verdict.shown) / len(self.verdict.things),
            **shares,
            "relation": None if relation is None else float(relation),
            "extra": float(self.verdict.extra > 0),
            "all right": float(self.verdict.all_right),
            "change": self.change,
        }


_BEGIN = '{"key"'  # of a line


class KeptClips:
    """Clips of earlier evaluations, a line each.

    Args:
        path: path of the file, which need not exist; `None` keeps nothing.

    Raises:
        ArgumentError: if the file has lines of another kind. One that a stopped process left unfinished is passed
            over.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._found: dict[str, Judged] = {}
        if path is None or not path.exists():
            return
        for number, line in enumerate(text_of(read_bytes(path), path).splitlines(), 1):
            said = None
            try:
                said = parse_json(line, path)
                self._found[said["key"]] = _read(said)
            except (ValueError, KeyError, TypeError) as error:
                unfinished = said is None and (line.startswith(_BEGIN) or _BEGIN.startswith(line))
                if not unfinished:
                    raise ArgumentError(f"line {number} of {path} is not a judged clip") from error

    def __getitem__(self, key: str) -> Judged | None:
        """Returns the clip of a key, or `None`."""
        return self._found.get(key)

    def add(self, key: str, clip: Judged, **said: Any) -> None:
        """Keeps a clip.

        Args:
            key: `key_of` all that it was made with.
            clip: the clip.
            **said: what else its line shall say, for whoever reads it.
        """
        self._found[key] = clip
        if self.path is not None:
            append_line(self.path, json.dumps({"key": key, **said, **dataclasses.asdict(clip)}))


def _read(said: dict[str, Any]) -> Judged:
    verdict = said["verdict"]
    return Judged(
        Verdict(tuple(map(str, verdict["things"])), verdict["relation"], int(verdict["extra"])),
        float(said["change"]),
        float(said["seconds"]),
    )


def key_of(*parts: Any) -> str:
    """Names what clips are made with: equal for equal parts, weights of networks among them.

    Args:
        *parts: numbers, texts, dataclasses such as methods, networks, and mappings or sequences of such.
    """
    digest = hashlib.sha256()
    _digest(digest, parts)
    return digest.hexdigest()[:16]


def _digest(digest: Any, part: Any) -> None:
    digest.update(f"{type(part).__qualname__}(".encode())
    if isinstance(part, nn.Module):
        part = dict(part.state_dict())
    if isinstance(part, torch.Tensor):
        digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
        digest.update(part.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        _digest(digest, {field.name: getattr(part, field.name) for field in dataclasses.fields(part)})
    elif isinstance(part, Mapping):
        for name in sorted(part, key=str):
            digest.update(f"{name}=".encode())
            _digest(digest, part[name])
    elif isinstance(part, (list, tuple)):
        for one in part:
            _digest(digest, one)
    else:
        digest.update(repr(part).encode())
    digest.update(b")")
