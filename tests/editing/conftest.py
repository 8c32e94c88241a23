"""The tiny editor, made once a module."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tests.editing.tiny import tiny_editor  # noqa: E402


@pytest.fixture(scope="module")
def editor():
    """An editor with random weights; tests leave it as it is."""
    return tiny_editor()


@pytest.fixture
def clip():
    """A clip of random pixels, smooth enough that its depth has a range."""
    import torch

    return torch.nn.functional.interpolate(torch.rand(8, 3, 6, 6), (64, 64), mode="bicubic").clamp(0, 1)
