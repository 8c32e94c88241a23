"""What tests of several operations check with."""

from __future__ import annotations

import pytest
from functorch.compile import make_boxed_func

from cvg_kernels import native

NATIVE = pytest.mark.skipif(native.reason("cpu") is not None, reason=str(native.reason("cpu")))

CPU_BACKENDS = ["reference", pytest.param("native", marks=NATIVE)]


class Counter:
    """A compiler that leaves graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return make_boxed_func(graph.forward)
