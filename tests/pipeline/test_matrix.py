"""Every method on every tiny pipeline:
the steps that it guides, what it changes, where it is refused, what it leaves.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from tests.pipeline.matrix import KNOWN, METHODS, ROUNDING, UNKNOWN, WORDS, Built  # noqa: E402
from tests.pipeline.snapshot import Snapshot  # noqa: E402
from tests.pipelines import PIPELINES  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def together(built, strength=1):
    """Two or three methods that are accepted on a pipeline, one of each kind: moving, setting maps, mixing."""
    names = [name for name in ("cvg", "vico_cross", "vstar", "gen1") if not METHODS[name].refused(built.case)]
    return names, cvg.Together(tuple(METHODS[name](built, strength) for name in names))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("built", KNOWN, indirect=True)
@pytest.mark.drawn(126)
def test_a_method_on_a_pipeline(built, name):
    method = METHODS[name]
    refused = method.refused(built.case)
    if refused:
        with pytest.raises(cvg.ArgumentError, match=refused), method(built).attach(built.pipe):
            built.run()
        return built.is_as_before()

    with method(built).attach(built.pipe) as run:
        video = built.run()
    assert run.guided == built.guided(0, method.stop) and run.calls == 1
    assert run.guided_steps == len(run.guided)
    assert video.isfinite().all() and (video - built.stock).abs().max() > ROUNDING
    built.is_as_before()

    stock = built.stock
    if name == "synopsis" and built.case.name == "animatediff_freenoise_prompts":
        stock = Built.of("animatediff_freenoise").stock  # of that one text, which the synopsis gives all frames
    with method(built, 0).attach(built.pipe) as run:
        video = built.run()
    assert run.guided == (built.guided(0, method.stop) if method.counts else [])
    if method.exact:
        assert torch.equal(video, stock)  # so the first has left nothing either
    else:
        torch.testing.assert_close(video, stock, rtol=1e-4, atol=ROUNDING)
    built.is_as_before()


@pytest.mark.parametrize("built", KNOWN, indirect=True)
@pytest.mark.drawn(8, of="long tests")
def test_methods_together(built):
    names, methods = together(built)
    if not names:
        with pytest.raises(cvg.ArgumentError), METHODS["cvg"](built).attach(built.pipe):
            built.run()
        return
    with methods.attach(built.pipe) as run:
        video = built.run()
    stop = max(METHODS[name].stop for name in names)
    assert run.guided == built.guided(0, stop)
    alone = []
    for name in (names[0], names[-1]):
        with METHODS[name](built).attach(built.pipe):
            alone.append(built.run())
    assert video.isfinite().all()
    for other in (built.stock, *(alone if len(names) > 1 else [])):
        assert (video - other).abs().max() > ROUNDING
    with together(built, 0)[1].attach(built.pipe):
        assert torch.equal(built.run(), built.stock)
    built.is_as_before()


@pytest.mark.parametrize("built", KNOWN, indirect=True)
@pytest.mark.drawn(12)
def test_the_drop_in_swap(built):
    with cvg.processors(built.pipe) as swap, cvg.trace_backends() as ran:
        video = built.run()
        assert swap.layers and ran
    torch.testing.assert_close(video, built.stock, rtol=1e-4, atol=ROUNDING)
    built.runs_as_before()


@pytest.mark.parametrize("built", ["cogvideox"], indirect=True)  # its classifier is as good as any
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_denoiser_is_refused(name, built):
    """By everything that is attached, with those that are known and the reason; nothing is left behind."""
    case = PIPELINES[name]
    pipe, _ = case.build()
    before = Snapshot(pipe)
    message = f"denoiser must be one of UNetMotionModel, .*, got {case.denoiser}: it makes images"
    for words in (WORDS, None):
        with pytest.raises(cvg.ArgumentError, match=message):
            cvg.capture(pipe, words, temporal=words is None).__enter__()
    for method in METHODS.values():
        with pytest.raises(cvg.ArgumentError, match=message):
            method(built).attach(pipe)
    before.check(pipe)
