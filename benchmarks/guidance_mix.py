"""Guidance mixes against the expression written out, from a checkout:
`python benchmarks/guidance_mix.py --json FILE`.
"""

import sys

from cvg_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "guidance_mix", *sys.argv[1:]]))
