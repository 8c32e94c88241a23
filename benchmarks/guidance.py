"""What a guided denoising step costs, by method, from a checkout: `python benchmarks/guidance.py --json FILE`."""

import sys

from cvg_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "guidance", *sys.argv[1:]]))
