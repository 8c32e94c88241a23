"""Attention with a band by frames against its rivals, from a checkout: `python benchmarks/frame_band_attention.py`."""

import sys

from cvg_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "frame_band_attention", *sys.argv[1:]]))
