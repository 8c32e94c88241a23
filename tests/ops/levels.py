"""The instruction-set levels of the CPU kernels as parameters of tests; one that cannot run is skipped with the
reason.
"""

from __future__ import annotations

import pytest

from cvg_kernels import native


def _why_not(level: str) -> str | None:
    """Why a level cannot run here; `None` if it can."""
    if (reason := native.reason("cpu")) is not None:
        return reason
    module = native.load("cpu")
    if level not in module.processor_levels():
        return f"this processor has no {level}"
    if level not in module.built_levels():
        return f"{level} was not built (CVG_CPU_LEVELS=all builds it)"
    return None


EVERY_LEVEL = [
    pytest.param(level, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for level in ("baseline", "avx2", "avx512")
    for reason in [_why_not(level)]
]
