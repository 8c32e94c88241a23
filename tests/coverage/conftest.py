"""A tiny pipeline of `tests.pipelines` and its stock run, which all tests of a module share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def row(request: pytest.FixtureRequest):
    """The pipeline whose name a test is parametrised with (`indirect`), run once without us."""
    from tests.coverage.row import Row

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the stock run must be rounded as those of the tests are
    yield Row.of(request.param)
    torch.set_num_threads(before)
