"""The program: finds the command, runs it, and prints errors that the user can fix as one line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from cvg_kernels import __version__
from cvg_kernels.cli.parser import Parser
from cvg_kernels.errors import CvgError

#: Command → what it does. Each is the module of its name beside this file, with two functions:
#: `add_arguments(parser)`, which imports nothing heavy, so that help comes at once, and `run(options) -> exit code`.
#: Only the module of the command that is asked for is imported.
COMMANDS = {
    "generate": "make a video, with and without guidance, and a report of what changed",
    "edit": "keep a clip's structure and give it other content",
    "shapes": "train or score the built-in world of moving shapes",
    "scenes": "train or measure a second world, in which words get lost",
    "cvg": "train the classifier that CVG guides by",
    "bench": "measure the kernels against what people use today",
    "tune": "measure which kernels are fastest here, for `auto` to go by",
    "info": "versions, devices, which kernels can run here, and what `auto` goes by",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: arguments of the command line; `None` takes those of this process.

    Returns:
        The exit code: 0, 2 for an error that the user can fix, 130 after an interrupt, or what the command says.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # Progress and errors are ours to print; the libraries' own notices only when asked for.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = Parser(prog="cvg-kernels", description="Steer text-to-video diffusion models at inference time.")
    parser.add_argument("--version", action="version", version=f"cvg-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        if name == wanted:
            module = importlib.import_module(f"cvg_kernels.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except CvgError as error:
        message = " ".join(str(error).split())
        print(f"cvg-kernels {options.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cvg-kernels {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe had enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
