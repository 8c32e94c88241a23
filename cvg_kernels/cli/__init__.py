"""The command line: `cvg-kernels COMMAND`."""

from cvg_kernels.cli.main import main

__all__ = ["main"]
