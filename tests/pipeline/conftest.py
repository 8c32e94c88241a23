"""A tiny pipeline of `tests.pipelines` that all tests of a module share: each leaves it as it was, and checks that."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest):
    """The case whose name a test is parametrised with (`indirect`), built once, and what its stock run gives."""
    from tests.pipeline.matrix import Built

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the stock run must be rounded as those of the tests are
    yield Built.of(request.param)
    torch.set_num_threads(before)
