"""Temporal attention against its rivals, from a checkout: `python benchmarks/temporal_attention.py --json FILE`."""

import sys

from cvg_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "temporal_attention", *sys.argv[1:]]))
