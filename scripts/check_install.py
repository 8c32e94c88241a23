#!/usr/bin/env python3
"""Tries an installed cvg-kernels: import, `info`, an operation on every backend there is and, with --video, a guided
clip.

It is run by the Python of the environment and from a folder that holds no sources; `make wheels` and the public CI do
so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red triangle moving right and a green square moving left"


def check_modules(expected: list[str]) -> None:
    """Ends the program if a compiled module that must be there is absent, or one that must not be is there."""
    import cvg_kernels
    from cvg_kernels import native

    place = Path(cvg_kernels.__file__).resolve()
    if ROOT in place.parents and sys.prefix not in str(place):
        sys.exit(f"{place} is the source tree, not an installed package")
    for target in ("cpu", "cuda"):
        reason = native.reason(target)
        if (reason is None) != (target in expected):
            sys.exit(f"the {target} module: {reason or 'it is there and must not be'}")
    print(f"{place.parent}: imported, compiled modules: {', '.join(expected) or 'none'}")


def check_operation() -> None:
    """Compares attention's backends with the reference."""
    import torch

    import cvg_kernels as cvg
    from cvg_kernels.backends import OPERATIONS, unavailable_reason

    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.randn(1, 2, 5, 32, device=device)
    expected = cvg.attention_with_capture(query, query, query, [0], backend="reference")
    for backend in OPERATIONS["attention"]:
        if (reason := unavailable_reason("attention", backend)) is not None:
            print(f"attention on {backend.value}: {reason}")
            continue
        where = "cpu" if backend.value == "native" else device
        given = query.to(where)
        found = cvg.attention_with_capture(given, given, given, [0], backend=backend.value)
        for a, b in ((found.out, expected.out), (found.maps, expected.maps)):
            torch.testing.assert_close(a, b.to(where), rtol=1e-3, atol=1e-3)
        print(f"attention on {backend.value}: right")


def check_clip() -> None:
    """Makes a guided clip with the shapes pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--guidance", "cvg", "--steps", "4", "--seed", "1", "--output", folder]
        run("generate", PROMPT, *options)
        if not (Path(folder) / "guided.gif").stat().st_size:
            sys.exit("guided.gif is empty")


def run(*arguments: str) -> None:
    """Runs the program."""
    subprocess.run([sys.executable, "-m", "cvg_kernels", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="*", default=[], choices=["cpu", "cuda"], help="compiled ones")
    parser.add_argument("--video", action="store_true", help="make a guided clip, which the extra `video` is for")
    options = parser.parse_args()
    check_modules(options.modules)
    run("info")
    check_operation()
    if options.video:
        check_clip()


if __name__ == "__main__":
    main()
