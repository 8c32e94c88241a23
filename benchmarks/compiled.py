"""Capture in a compiled denoiser, from a checkout: `python benchmarks/compiled.py --json FILE`."""

import sys

from cvg_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "compiled", *sys.argv[1:]]))
