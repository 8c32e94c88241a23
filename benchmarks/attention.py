"""Attention with capture against its rivals, from a checkout: `python benchmarks/attention.py --json FILE`."""

import sys

from cvg_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "attention", *sys.argv[1:]]))
