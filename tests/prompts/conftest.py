"""Tokenizers of every kind, made once a module."""

import pytest


@pytest.fixture(scope="module")
def tokenizers():
    from tests.prompts.made_tokenizers import KINDS

    return {kind: make() for kind, make in KINDS.items()}
