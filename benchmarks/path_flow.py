"""Min-max path flow against its rivals, from a checkout: `python benchmarks/path_flow.py --json FILE`."""

import sys

from cvg_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "path_flow", *sys.argv[1:]]))
