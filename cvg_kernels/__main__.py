"""`python -m cvg_kernels` is `cvg-kernels`."""

import sys

from cvg_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
