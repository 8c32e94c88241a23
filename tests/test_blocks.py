"""Context managers of ours that are entered twice: what may be entered again is right again, and the rest says why."""

from __future__ import annotations

import pytest
import torch

import cvg_kernels as cvg
from cvg_kernels.blocks import block
from cvg_kernels.errors import ArgumentError
from cvg_kernels.writing import written, written_folder

OPEN = r"this block of {}\(…\) is open already: leave it first, or call {}\(…\) again"


def product() -> None:
    cvg.min_max_matmul(torch.rand(1, 2, 3), torch.rand(1, 3, 4), backend="reference")


def test_traces():
    tracing = cvg.trace_backends()
    for _ in range(2):
        with tracing as calls:
            with pytest.raises(ArgumentError, match=OPEN.format(*["trace_backends"] * 2)), tracing:
                pass
            product()
        assert calls == [("min_max_matmul", "reference")]
    with cvg.trace_backends() as outer, cvg.trace_backends() as inner:
        product()
    assert not outer and len(inner) == 1


def test_temporal_layers():
    pytest.importorskip("diffusers")
    from cvg_kernels.guidance import temporal_layers_off
    from tests.pipelines import PIPELINES

    unet = PIPELINES["animatediff"].build()[0].unet
    before = {name: vars(module).get("forward") for name, module in unet.named_modules()}
    off = temporal_layers_off(unet)
    for _ in range(2):
        with off:
            assert {name: vars(module).get("forward") for name, module in unet.named_modules()} != before
            with pytest.raises(ArgumentError, match=OPEN.format(*["temporal_layers_off"] * 2)), off:
                pass
        assert {name: vars(module).get("forward") for name, module in unet.named_modules()} == before
    with pytest.raises(ArgumentError, match="denoiser must"), temporal_layers_off(unet.conv_in):
        pass


@pytest.mark.parametrize("make", [written, written_folder])
def test_files(make, tmp_path):
    one = make(tmp_path / "a")
    for text in ("first", "second"):
        with one as new:
            (new / "b" if make is written_folder else new).write_text(text)
            with pytest.raises(ArgumentError, match=OPEN.format(*[make.__name__] * 2)), one:
                pass
        assert (tmp_path / "a/b" if make is written_folder else tmp_path / "a").read_text() == text


def test_captures():
    pytest.importorskip("diffusers")
    from tests.pipelines import PIPELINES, run

    pipe, options = PIPELINES["animatediff"].build()
    with cvg.capture(pipe, words=["cat"]) as captured:
        with pytest.raises(ArgumentError, match="attached to the AnimateDiffPipeline already"), captured:
            pass
        run(pipe, options, num_inference_steps=1)
    assert captured.records
    with cvg.capture(pipe, words=["cat"]) as other:
        run(pipe, options, num_inference_steps=1)
    assert len(other.records) == len(captured.records)


# --- what makes them -------------------------------------------------------------------------------------------------


def test_a_block_is_left_whatever_ends_it():
    told = []

    @block
    def noted(name, fails=False):
        if fails:
            raise KeyError(name)
        told.append(f"into {name}")
        try:
            yield name.upper()
        except ValueError:
            told.append("swallowed")
        finally:
            told.append(f"out of {name}")

    one = noted("a")
    with one as name:
        assert name == "A"
        raise ValueError
    assert told == ["into a", "swallowed", "out of a"]
    with pytest.raises(ZeroDivisionError), one:
        1 / 0  # noqa: B018
    wrong = noted("b", fails=True)
    for _ in range(2):
        with pytest.raises(KeyError), wrong:
            pass
    told.clear()

    @noted("c")
    def twice(number):
        told.append(number)
        return twice(number - 1) if number else "done"

    assert twice(1) == "done" and told == ["into c", 1, "into c", 0, "out of c", "out of c"]
    assert noted.__name__ == "noted"
