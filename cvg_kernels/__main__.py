"""`python -m cvg_kernels` is `cvg-kernels`."""

import sys

from cvg_kernels.cli import main

sys.exit(main())
