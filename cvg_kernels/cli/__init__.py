"""The command line: `cvg-kernels COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from cvg_kernels import __version__
from cvg_kernels.errors import CvgError

#: Command → what it does. Each lives in the module of its name here, with `add_arguments` and `run`.
COMMANDS = {
    "generate": "make a video, with and without guidance, and a report of what changed",
    "shapes": "train or score the built-in world of moving shapes",
    "bench": "measure the kernels against what people use today",
    "info": "versions, devices, and which backends can run here",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code: 0, 1 after a failure, 2 for what the user can mend."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="cvg-kernels", description="Steer text-to-video diffusion models at inference time."
    )
    parser.add_argument("--version", action="version", version=f"cvg-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_line in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, description=help_line)
        if arguments[:1] == [name]:  # the others' modules are not needed, nor what they import
            module = importlib.import_module(f"cvg_kernels.cli.{name}")
            module.add_arguments(command)
    options = parser.parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return module.run(options)
    except CvgError as error:
        print(f"cvg-kernels {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cvg-kernels {options.command}: interrupted", file=sys.stderr)
        return 130
