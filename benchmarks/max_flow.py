"""Exact maximum flow against OR-tools, from a checkout: `python benchmarks/max_flow.py --json FILE`."""

import sys

from cvg_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "max_flow", *sys.argv[1:]]))
