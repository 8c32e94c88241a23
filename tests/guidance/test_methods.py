"""Guidance methods as the command line spells them."""

from __future__ import annotations

import pytest

import cvg_kernels as cvg
from cvg_kernels.guidance import Together
from cvg_kernels.guidance.methods import method_named


def test_names():
    assert method_named("none") is None
    assert method_named("vico") == cvg.Vico()
    assert method_named("vico", ["cat"]) == cvg.Vico(words=["cat"])
    assert method_named("gen1", ["cat"]) == cvg.Gen1()


def test_options():
    assert method_named("vico:step_size=5e-2:until=0.2:flow=hard:residual=None") == cvg.Vico(
        step_size=0.05, until=0.2, flow="hard", residual=None
    )
    assert method_named("gen1:temporal_scale=1e+1:backend=reference") == cvg.Gen1(
        10.0, backend="reference"
    )


def test_combinations():
    made = method_named("vico:step_size=1e+0:until=0.2+gen1:temporal_scale=2", ["cat"])
    assert made == Together((cvg.Vico(["cat"], step_size=1.0, until=0.2), cvg.Gen1(2)))


@pytest.mark.parametrize(
    "spec, message",
    [
        ("magic", "guidance must be one of none, vico, .*gen1.*, got 'magic'"),
        ("", "guidance must be one of .*, got ''"),
        ("vico+magic", "guidance must be one of .*, got 'magic'"),
        ("vico+none", "'none' cannot be combined with others, got 'vico\\+none'"),
        ("none:until=1", "'none' takes option=value with the options none; got 'until=1'"),
        ("gen1:speed=2", "with the options temporal_scale, start, until, backend; got 'speed=2'"),
        ("gen1:temporal_scale", "takes option=value with the options .*; got 'temporal_scale'"),
        ("gen1:temporal_scale=much", "'gen1:temporal_scale=much' cannot be made: must be real"),
        ("gen1:until=2", r"start and until must lie in \[0, 1\]"),
    ],
)
def test_errors_name_what_was_given(spec, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        method_named(spec)
