#!/usr/bin/env python3
"""Says how many files the last build in place compiled, how long it took and which files took longest:
`make build-times`.

The figures are ninja's own: seconds by the clock, of compilers that ran side by side.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def read(log: Path) -> dict[str, tuple[float, float]]:
    """Output → begin and end in seconds, of what is still there of a log of ninja (.ninja_log)."""
    found: dict[str, tuple[float, float]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        begin, end, _, output, _ = line.split("\t")
        if (log.parent / output).exists():
            found[output] = (int(begin) / 1000, int(end) / 1000)
    return found


def report(module: str, steps: dict[str, tuple[float, float]], most: int) -> list[str]:
    """The lines about one module."""
    objects = {Path(name): end - begin for name, (begin, end) in steps.items() if name.endswith((".o", ".obj"))}
    slowest = sorted(objects.items(), key=lambda item: -item[1])[:most]
    took = max(end for _, end in steps.values()) - min(begin for begin, _ in steps.values())
    lines = [
        f"{module}: {len(objects)} files compiled, {sum(objects.values()):.0f} s one after the other, {took:.0f} s in "
        "all"
    ]
    for path, seconds in slowest:
        target = next((part.removesuffix(".dir") for part in path.parts if part.endswith(".dir")), "")
        lines.append(f"  {seconds:6.1f} s  {path.stem}  ({target})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="the folder of setup.py's builds")
    parser.add_argument("--most", type=int, default=8, help="slowest files to list of each module")
    options = parser.parse_args()
    logs = sorted(options.build.glob("temp*/*/.ninja_log"))
    if not logs:
        sys.exit(f"{options.build} holds no build of a native module (temp*/*/.ninja_log)")
    for log in logs:
        if steps := read(log):
            print("\n".join(report(log.parent.name, steps, options.most)))


if __name__ == "__main__":
    main()
