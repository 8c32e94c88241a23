"""Kernels after a fork and in spawned processes; runs and handles without end; a pipeline that two threads call."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import weakref
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels import native  # noqa: E402
from tests.pipeline.field import WORDS, tree  # noqa: E402
from tests.pipelines import PIPELINES, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
compiled = pytest.mark.skipif(native.reason("cpu") is not None, reason=str(native.reason("cpu")))

# Every kernel for the CPU once. Torch's own operations would wait for ever in the fork: the layers are so small that
# they take one thread.
_CALLS = """
import os, signal, sys
import torch
import cvg_kernels as cvg

torch.manual_seed(0)
torch.set_num_threads(2)
query = torch.randn(2, 4, 64, 16)
frames = torch.arange(64) // 8
temporal = torch.randn(16, 4, 8, 16)
cross, hops = torch.rand(2, 3, 8, 16), [torch.rand(2, 16, 8, 8) for _ in range(2)]

def results():
    native = {"backend": "native"}
    return [
        cvg.attention_with_capture(query, query, query, [0, 3], **native).out,
        cvg.frame_band_attention(query, query, query, frames, frames, sigma=2.0, **native).out,
        cvg.temporal_attention(temporal, temporal, temporal, sigma=2.0, strength=1.0, **native).out,
        cvg.path_flow(cross, hops, **native),
        cvg.subgraph_max_flow(cross, hops, **native).flow,
        cvg.guidance_mix([query, query + 1], [2.0], **native),
    ]

def looked_at():
    return [result.tolist() for result in results()]
"""
_FORK = f"""{_CALLS}
here = looked_at()
child = os.fork()
if child == 0:
    signal.alarm(120)
    os._exit(0 if looked_at() == here else 3)
assert os.waitpid(child, 0)[1] == 0
"""


@compiled
def test_kernels_run_in_a_fork_after_their_threads_did(fresh, tmp_path):
    """The threads of OpenMP are not in a fork, which would wait for them; there one thread computes the same."""
    fresh.right(_FORK, tmp_path)


def attend(query: torch.Tensor) -> torch.Tensor:
    return cvg.attention_with_capture(query, query, query, [0], backend="native").maps


@compiled
@pytest.mark.drawn(44, of="two processes")
def test_spawned_processes_compute_the_same():
    query = torch.randn(1, 2, 33, 16)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for maps in pool.map(attend, [query] * 3):
            assert torch.equal(maps, attend(query))


def resident() -> int:
    """Bytes of memory that the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.drawn(2, of="long lives")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
def test_twenty_guided_runs_need_no_more_memory_than_three():
    """No object stays, no tensor, and no memory but what allocators keep back: less than one run's maps a run."""
    pipe, options = PIPELINES["wan"].build()

    def guided() -> None:
        with cvg.Vico(words=WORDS, stop=1.0).attach(pipe), cvg.capture(pipe, words=WORDS):
            run(pipe, options, num_inference_steps=2)

    def counted() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        return len(objects), sum(isinstance(one, torch.Tensor) for one in objects)

    for _ in range(3):
        guided()
    before, tensors = counted()
    memory = resident()
    for _ in range(17):
        guided()
    after, left = counted()
    assert left == tensors
    assert after - before < 17  # less than one a run
    assert resident() - memory < 64 * 2**20


@pytest.mark.drawn(2, of="long lives")
def test_a_thousand_handles_leave_the_pipeline_as_it_was():
    pipe, _ = PIPELINES["animatediff"].build()
    before = tree(pipe)
    handles = (
        lambda: cvg.Vico(words=WORDS).attach(pipe),
        lambda: cvg.capture(pipe, words=WORDS),
        lambda: cvg.processors(pipe),
        lambda: cvg.VSTAR(sigma=1.0).attach(pipe),
    )
    for handle in handles:
        with handle():
            pass
    gc.collect()
    objects = len(gc.get_objects())
    last = None
    for number in range(1000):
        with handles[number % len(handles)]() as entered:
            last = weakref.ref(entered)
    del entered
    gc.collect()
    assert last() is None
    assert len(gc.get_objects()) - objects < 100
    assert tree(pipe) == before


def test_a_pipeline_that_two_threads_call_at_once_is_right_or_refused():
    """Each call gives the guided video of its own alone, or an error of ours; never a mixture."""
    pipe, options = PIPELINES["wan"].build()
    method = cvg.Vico(words=WORDS, stop=1.0)
    with method.attach(pipe):
        alone = run(pipe, options)
    begun, ends = threading.Barrier(2), []

    def call() -> None:
        begun.wait()
        try:
            ends.append(run(pipe, options))
        except Exception as error:  # noqa: BLE001 - which one is asserted below
            ends.append(error)

    with method.attach(pipe):
        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(ends) == 2
    for end in ends:
        if isinstance(end, Exception):
            assert isinstance(end, cvg.CvgError), repr(end)
        else:
            assert torch.equal(end, alone)
    with method.attach(pipe):
        assert torch.equal(run(pipe, options), alone)
