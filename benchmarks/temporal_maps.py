"""Maps between frames against their rivals, from a checkout: `python benchmarks/temporal_maps.py --json FILE`."""

import sys

from cvg_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "temporal_maps", *sys.argv[1:]]))
