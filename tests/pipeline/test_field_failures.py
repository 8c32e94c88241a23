"""Errors and interruptions at every place of a pipeline's call: the next run is as if there had been none."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from tests.pipeline.field import WORDS, build, tree, vico  # noqa: E402
from tests.pipelines import denoisers, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def fails_in_the_denoiser(pipe, error):
    """After the guidance, before the scheduler."""
    layer = next(m for m in denoisers(pipe)[0].modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))

    def fail(module, args, output):
        if not torch.is_grad_enabled():
            raise error

    return layer.register_forward_hook(fail).remove, {}


def fails_in_the_guidance(pipe, error):
    layer = next(m for m in denoisers(pipe)[0].modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))

    def fail(module, args, output):
        if torch.is_grad_enabled():
            raise error

    return layer.register_forward_hook(fail).remove, {}


def fails_in_a_callback(pipe, error):
    def fail(pipe, step, timestep, tensors):
        raise error

    return lambda: None, {"callback_on_step_end": fail}


def fails_in_the_scheduler(pipe, error):
    scheduler, stock = pipe.scheduler, pipe.scheduler.step

    def fail(*args, **kwargs):
        raise error

    scheduler.step = fail

    def undo():
        del vars(scheduler)["step"]

    assert stock.__self__ is scheduler
    return undo, {}


def fails_while_reading(pipe, error):
    def fail(module, args, kwargs):
        raise error

    return pipe.text_encoder.register_forward_pre_hook(fail, with_kwargs=True).remove, {}


def fails_in_the_decoder(pipe, error):
    """After the last step."""
    vae = pipe.vae

    def fail(*args, **kwargs):
        raise error

    vae.decode = fail
    return lambda: vars(vae).pop("decode"), {}


def fails_in_the_backward(pipe, error):
    """Of the guidance's loss."""
    layer = next(m for m in denoisers(pipe)[0].modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))

    def watch(module, args, output):
        if output.requires_grad:
            output.register_hook(fail)

    def fail(grad):
        raise error

    return layer.register_forward_hook(watch).remove, {}


FAILURES = [
    fails_in_the_denoiser,
    fails_in_the_guidance,
    fails_in_the_backward,
    fails_in_the_decoder,
    fails_in_a_callback,
    fails_in_the_scheduler,
    fails_while_reading,
]


@pytest.mark.drawn(3)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, torch.OutOfMemoryError, ValueError])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.__name__)
def test_a_run_that_ends_early_leaves_nothing_to_the_next(failure, kind):
    """Within the block the next run is as if there had been none; of another size it may be too."""
    pipe, options = build()
    error = kind("on purpose")
    before = tree(pipe)
    with vico().attach(pipe) as clean, cvg.capture(pipe, words=WORDS) as whole:
        want = run(pipe, options)
    with vico().attach(pipe) as made, cvg.capture(pipe, words=WORDS) as captured:
        undo, changes = failure(pipe, error)
        with pytest.raises(type(error)):
            run(pipe, {**options, "num_frames": 3}, "a blue dog and a red cat", **changes)
        undo()
        known = len(made.history), len(captured.records)
        torch.testing.assert_close(run(pipe, options), want, rtol=0, atol=0)
    assert len(made.history) - known[0] == len(clean.history) == 2
    assert len(captured.records) - known[1] == len(whole.records)
    torch.testing.assert_close(captured.heat_map("cat"), whole.heat_map("cat"))
    assert tree(pipe) == before
