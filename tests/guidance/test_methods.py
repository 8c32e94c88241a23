"""Guidance methods as the command line spells them."""

from __future__ import annotations

import pytest

import cvg_kernels as cvg
from cvg_kernels.guidance import Together
from cvg_kernels.guidance.methods import method_named, methods_named


def test_names():
    assert method_named("none") is None
    assert method_named("vico") == cvg.Vico()
    assert method_named("vico", ["cat"]) == cvg.Vico(words=["cat"])
    assert method_named("gen1", ["cat"]) == cvg.Gen1()


def test_options():
    assert method_named("vico:step_size=5e-2:stop=0.2:flow=hard:residual=None") == cvg.Vico(
        step_size=0.05, stop=0.2, flow="hard", residual=None
    )
    assert method_named("gen1:temporal_scale=1e+1:backend=reference") == cvg.Gen1(10.0, backend="reference")


def test_separators_in_brackets_and_quotes_belong_to_the_value():
    made = method_named("vico:levels=((16,16),(8,8)):iterations={0: 10, 2: 5}:stop=0.2+gen1:temporal_scale=2")
    levels = cvg.Vico(levels=((16, 16), (8, 8)), iterations={0: 10, 2: 5}, stop=0.2)
    assert made == Together((levels, cvg.Gen1(2)))
    assert method_named("vico:words=['a:b,c+d', 'cat']") == cvg.Vico(words=["a:b,c+d", "cat"])
    found = methods_named("none,vico:levels=((16,16),),vico+gen1")
    assert list(found) == ["none", "vico:levels=((16,16),)", "vico+gen1"]
    assert found["vico:levels=((16,16),)"] == cvg.Vico(levels=((16, 16),))


def test_a_method_named_twice_is_told():
    with pytest.raises(cvg.ArgumentError, match="guidance methods must differ, got 'vico,none,vico'"):
        methods_named("vico,none,vico")


def test_old_names_of_options_still_work():
    for spec, made in (("vico:until=0.2", cvg.Vico(stop=0.2)), ("gen1:until=1", cvg.Gen1(stop=1))):
        with pytest.warns(FutureWarning, match=f"until is called stop now: {type(made).__name__}"):
            assert method_named(spec) == made
    with pytest.warns(FutureWarning, match="steps is a share called stop now"):
        assert method_named("cvg:steps=2").steps == 2


def test_combinations():
    made = method_named("vico:step_size=1e+0:stop=0.2+gen1:temporal_scale=2", ["cat"])
    assert made == Together((cvg.Vico(["cat"], step_size=1.0, stop=0.2), cvg.Gen1(2)))


@pytest.mark.parametrize(
    "spec, message",
    [
        ("magic", "guidance must be one of none, cvg, vico, vstar, gen1, temporal-band, flowmo, got 'magic'"),
        ("vicco", "guidance must be one of .*, got 'vicco'; did you mean 'vico'\\?"),
        ("vico:stpo=0.2", "takes option=value with the options .*; got 'stpo=0.2'; did you mean 'stop'\\?"),
        ("cvg+vico:stop=two", "^guidance 'vico': stop must be a finite number in \\[0, 1\\], got 'two'$"),
        ("vico:stop", "takes option=value with the options .*; got 'stop'$"),
        ("vico:flow=exct", "flow must be one of .*, got 'exct'; did you mean 'exact'\\?"),
        ("", "guidance must be one of .*, got ''"),
        ("vico+magic", "guidance must be one of .*, got 'magic'"),
        ("vico+none", "'none' cannot be combined with others, got 'vico\\+none'"),
        ("none:stop=1", "'none' takes option=value with the options none; got 'stop=1'"),
        ("gen1:speed=2", "with the options start, stop, temporal_scale, backend; got 'speed=2'"),
        ("gen1:temporal_scale", "takes option=value with the options .*; got 'temporal_scale'"),
        ("gen1:temporal_scale=much", "temporal_scale must be a finite number, got 'much'"),
        ("gen1:stop=2", r"stop must be a finite number in \[0, 1\], got 2"),
    ],
)
def test_errors_name_what_was_given(spec, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        method_named(spec)
