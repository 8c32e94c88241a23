"""Runs of a pipeline as people make them: broken off, repeated, shared, changed on the way, in other threads."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import pickle
import threading
import weakref

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402
import torch  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from tests.pipeline.field import WORDS, Push, build, tree, vico  # noqa: E402
from tests.pipelines import PIPELINES, PROMPT, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


# -- runs that end early


@pytest.mark.parametrize("name", ["animatediff", "wan", "cogvideox"])
def test_a_run_that_is_interrupted_by_its_flag(name):
    """`pipe._interrupt = True` in a callback: the pipeline stops stepping and returns what it has."""
    pipe, options = build(name)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 0
        return {}

    with Push().attach(pipe) as made, cvg.capture(pipe, words=WORDS) as captured:
        run(pipe, options, callback_on_step_end=stop)
        first = list(made.guided)
        run(pipe, options)
    assert first == [(0, 0)]
    assert made.guided == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert {(record.run, record.step) for record in captured.records} == set(made.guided)


def test_a_generator_that_is_closed_in_the_middle():
    """Seeds in a loop, each video handed out as it is ready, the consumer gone after the first."""
    pipe, options = build()
    before = tree(pipe)

    def videos():
        with vico().attach(pipe), cvg.capture(pipe, words=WORDS):
            while True:
                yield run(pipe, options)

    made = videos()
    next(made)
    assert tree(pipe) != before
    made.close()
    assert tree(pipe) == before


# -- several runs in a block


@pytest.mark.drawn(8, of="long tests")
def test_the_runs_of_a_capture_are_told_apart():
    pipe, options = build()
    other = "a blue dog and a red cat"
    with cvg.capture(pipe, words=["cat"]) as one:
        run(pipe, options)
    with cvg.capture(pipe, words=["cat"]) as two:
        run(pipe, {**options, "num_frames": 3}, other)
    with cvg.capture(pipe, words=["cat"]) as both:
        run(pipe, options)
        run(pipe, {**options, "num_frames": 3}, other)
    assert {record.run for record in both.records} == {0, 1}
    torch.testing.assert_close(both.heat_map("cat", run=0), one.heat_map("cat"))
    torch.testing.assert_close(both.heat_map("cat", run=1), two.heat_map("cat"))
    torch.testing.assert_close(both.heat_map("cat"), two.heat_map("cat"))
    with pytest.raises(cvg.ArgumentError, match="run must be one of the 2 captured runs, got 2"):
        both.heat_map("cat", run=2)
    assert "2 run(s)" in repr(both) and "cat" in repr(both)


# -- pipelines that share parts, and copies


def test_other_pipelines_on_the_same_network_are_left_alone():
    """`from_pipe`: the same denoiser, text encoder and scheduler in another pipeline."""
    pipe, options = build()
    other = diffusers.AnimateDiffPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    want = run(other, options, "a blue dog")
    with vico().attach(pipe) as made, cvg.capture(pipe, words=WORDS) as captured:
        run(pipe, options)
        known = len(made.history), len(captured.records)
        assert torch.equal(run(other, options, "a blue dog"), want)
        assert (len(made.history), len(captured.records)) == known
    assert made.calls == 1


def test_copies_are_of_the_pipeline_alone():
    """A copy made in the block runs as the stock pipeline does, and takes handles of its own."""
    pipe, options = build()
    want, before = run(pipe, options), tree(pipe)
    with Push().attach(pipe) as made, cvg.processors(pipe):
        guided = run(pipe, options)
        twin = copy.deepcopy(pipe)
        assert torch.equal(run(twin, options), want)
        assert made.calls == 1
        with Push().attach(twin) as its:
            torch.testing.assert_close(run(twin, options), guided, rtol=1e-4, atol=1e-4)
        assert its.guided_steps == 3 and made.calls == 1
    assert tree(pipe) == before
    assert torch.equal(run(twin, options), want)
    assert not [name for name in vars(twin) if "cvg" in name]


@pytest.mark.drawn(6)
@pytest.mark.parametrize("during", [False, True], ids=["after", "during"])
def test_networks_are_pickled_as_they_were(during):
    pipe, options = build()
    want = run(pipe, options)
    held = []

    def save(*_):
        file = io.BytesIO()
        torch.save(pipe.unet, file)
        held.append(file)
        return {}

    with Push().attach(pipe), cvg.capture(pipe, words=WORDS), cvg.processors(pipe):
        run(pipe, options, **({"callback_on_step_end": save} if during else {}))
        save()
    for file in held:
        file.seek(0)
        pipe.unet = torch.load(file, weights_only=False)
        torch.testing.assert_close(run(pipe, options), want, rtol=1e-4, atol=1e-4)


def test_schedulers_are_pickled_as_they_were():
    pipe, options = build()
    with Push().attach(pipe):
        run(pipe, options)
        again = pickle.loads(pickle.dumps(pipe.scheduler))
    assert type(again) is diffusers.DDIMScheduler
    assert pickle.loads(pickle.dumps(cvg.Vico(WORDS))) == cvg.Vico(WORDS)


def test_two_threads_with_a_pipeline_each():
    results = {}
    alone = {}

    def work(name, into):
        pipe, options = built[name]
        barrier.wait()
        method = Push(by=0.2 if name == "wan" else 0.4)
        with method.attach(pipe) as made, cvg.capture(pipe, words=["cat"]) as captured:
            latents = torch.as_tensor(
                pipe(
                    PROMPT,
                    **options,
                    num_inference_steps=3,
                    output_type="latent",
                    generator=torch.Generator().manual_seed(0),
                )[0]
            )
        into[name] = latents, made.guided, captured.heat_map("cat")

    built = {name: build(name) for name in ("animatediff", "wan")}  # seeds are global
    for name in built:
        barrier = threading.Barrier(1)
        work(name, alone)
    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=work, args=(name, results)) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, (latents, guided, heat) in alone.items():
        torch.testing.assert_close(results[name][0], latents)
        assert results[name][1] == guided == [(0, 0), (0, 1), (0, 2)]
        torch.testing.assert_close(results[name][2], heat)


def test_what_is_kept_keeps_no_model():
    pipe, options = build("wan")
    network, whole = weakref.ref(pipe.transformer), weakref.ref(pipe)
    with Push().attach(pipe) as made, cvg.capture(pipe, words=["cat"]) as captured:
        run(pipe, options, num_inference_steps=1)
    swap = cvg.use_processors(pipe)
    swap.restore()
    del pipe
    gc.collect()
    assert whole() is None and network() is None
    assert captured.heat_map("cat").isfinite().all() and made.guided_steps == 1 and not swap.layers


@pytest.mark.drawn(8, of="long tests")
def test_many_blocks_leave_no_objects():
    pipe, options = build("wan")

    def block():
        with Push().attach(pipe), cvg.capture(pipe, words=["cat"]), cvg.processors(pipe):
            run(pipe, options, num_inference_steps=1)
        gc.collect()
        return len(gc.get_objects())

    block()
    first = block()
    counts = [block(), block()]
    assert max(counts) - first < 50


# -- handles that come and go in any order


def handles(pipe):
    return {
        "capture": cvg.capture(pipe, words=["cat"]),
        "method": Push().attach(pipe),
        "processors": cvg.processors(pipe),
    }


ORDERS = list(itertools.permutations(["capture", "method", "processors"]))


@pytest.mark.drawn(3)
@pytest.mark.parametrize("leaving", ORDERS, ids="-".join)
@pytest.mark.parametrize("entering", ORDERS, ids="-".join)
def test_handles_leave_in_any_order(entering, leaving):
    """By hand, as in a notebook: each acts until it leaves, whatever the others do."""
    pipe, options = PIPELINES["wan"].build()
    before, made = tree(pipe), handles(pipe)
    entered = {name: made[name].__enter__() for name in entering}
    inside = set(entering)
    for name in leaving:
        counts = len(entered["capture"].records), len(entered["method"].guided)
        with cvg.trace_backends() as ran:
            run(pipe, options, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
        assert (len(entered["capture"].records) > counts[0]) == ("capture" in inside)
        assert (len(entered["method"].guided) > counts[1]) == ("method" in inside)
        assert bool(ran) == bool(inside & {"capture", "processors"})
        made[name].__exit__(None, None, None)
        inside.remove(name)
    assert tree(pipe) == before


def test_two_of_a_kind_leave_in_the_order_they_came():
    pipe, options = build()
    before = tree(pipe)
    first, second = cvg.use_processors(pipe), cvg.use_processors(pipe)
    first.restore()
    with cvg.trace_backends() as ran:
        run(pipe, options, num_inference_steps=1)
    assert ran
    second.restore()
    assert tree(pipe) == before
    one, two = cvg.capture(pipe, words=["cat"]), cvg.capture(pipe, words=["dog"])
    one.__enter__()
    two.__enter__()
    run(pipe, options, num_inference_steps=1)
    one.__exit__(None, None, None)
    run(pipe, options, num_inference_steps=1)
    two.__exit__(None, None, None)
    assert (one.words, two.words) == (("cat",), ("dog",))
    assert {record.run for record in one.records} == {0}
    assert {record.run for record in two.records} == {0, 1}
    assert tree(pipe) == before


def test_handles_that_come_and_go_in_the_middle_of_a_run():
    """In callbacks: what comes takes part in the runs that begin later, what goes has gone at once."""
    pipe, options = build()
    before = tree(pipe)
    outer, inner = Push(), Push(by=0.1)
    leaving, coming = outer.attach(pipe), inner.attach(pipe)
    guided = leaving.__enter__()
    late = []

    def change(pipe, step, timestep, tensors):
        if step == 0:
            late.append(coming.__enter__())
        if step == 1:
            leaving.__exit__(None, None, None)
        return {}

    run(pipe, options, callback_on_step_end=change)
    assert guided.guided == [(0, 0), (0, 1)] and not late[0].guided
    run(pipe, options)
    assert late[0].guided_steps == 3 and guided.guided_steps == 2
    coming.__exit__(None, None, None)
    assert tree(pipe) == before


@pytest.mark.drawn(3)
@pytest.mark.parametrize("first", ["capture", "method"])
@pytest.mark.parametrize(
    "method",
    [vico(), cvg.VSTAR(sigma=1.0), cvg.Gen1(), cvg.TemporalBand(iterations=2, stop=0.5), vico(flow="cross")],
    ids=lambda method: type(method).__name__ + getattr(method, "flow", ""),
)
def test_a_capture_sees_the_pipelines_calls_alone(first, method):
    """A method's own calls are not recorded, whichever of the two came first."""
    pipe, options = build()
    with contextlib.ExitStack() as stack:
        if first == "method":
            stack.enter_context(method.attach(pipe))
        captured = stack.enter_context(cvg.capture(pipe, words=["cat"], temporal=True))
        if first == "capture":
            stack.enter_context(method.attach(pipe))
        run(pipe, options)
    kinds = {(r.step, r.layer, r.branch) for r in captured.records}
    layers = [one for one in pipe.unet.attn_processors if "attn2" in one or "motion_modules" in one]
    assert len(kinds) == len(captured.records) == 3 * 2 * len(layers)


@pytest.mark.drawn(8, of="long tests")
def test_a_handle_may_be_entered_again():
    """After it was left, and a capture not at all: its records are those of one block."""
    pipe, options = build()
    session = vico().attach(pipe)
    with session as first:
        want = run(pipe, options)
        with pytest.raises(cvg.ArgumentError, match="attached to the AnimateDiffPipeline already"), session:
            pass
        assert torch.equal(run(pipe, options), want)
    with session as second:
        torch.testing.assert_close(run(pipe, options), want, rtol=0, atol=0)
    assert first is not second and first.guided == [*second.guided, (1, 0), (1, 1)]
    assert second.guided == [(0, 0), (0, 1)]
    with cvg.capture(pipe, words=["cat"]) as captured:
        run(pipe, options)
    with pytest.raises(cvg.ArgumentError, match="has been open already"), captured:
        pass
    with pytest.raises(cvg.ArgumentError, match="enter what attach.pipe. returns"), second:
        pass


def test_a_block_of_processors_may_be_entered_again():
    pipe, _ = build()
    stock = dict(pipe.unet.attn_processors)
    block = cvg.processors(pipe)
    for _ in range(2):
        with block as swap:
            assert swap.layers
            with pytest.raises(cvg.ArgumentError, match="is open already"), block:
                pass
        assert pipe.unet.attn_processors == stock
    with pytest.raises(cvg.ArgumentError, match="has been restored already"), swap:
        pass
    with cvg.use_processors(pipe) as swap:
        assert swap.layers
    assert not swap.layers and pipe.unet.attn_processors == stock
