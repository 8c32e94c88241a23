"""trace_backends sees backward passes wherever autograd runs them: on a GPU it does so in threads of its own."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch

import cvg_kernels as cvg
from tests.ops.backends import DEVICE


def elsewhere(call):
    """The result of a call in a thread that knows nothing of the context here, as autograd's GPU threads do."""
    results = []
    context = contextvars.Context()
    thread = threading.Thread(target=lambda: results.append(context.run(call)))
    thread.start()
    thread.join()
    (result,) = results  # empty where the thread raised
    return result


def maps(*shape: int) -> torch.Tensor:
    return torch.rand(shape, device=DEVICE).requires_grad_()


#: Operation → a call of it that can be differentiated.
CALLS = {
    "attention": lambda: cvg.attention_with_capture(*(maps(1, 2, 9, 8) for _ in range(3)), [1])[:2],
    "frame_band_attention": lambda: cvg.frame_band_attention(
        *(maps(1, 2, 6, 8) for _ in range(3)), [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], sigma=1.0
    ),
    "temporal_attention": lambda: cvg.temporal_attention(
        *(maps(3, 2, 4, 8) for _ in range(3)), sigma=1.0, capture=True
    ),
    "temporal_maps": lambda: [cvg.temporal_maps(*(maps(1, 2, 12, 8) for _ in range(2)), None, (3, 2, 2))],
    "path_flow": lambda: [cvg.path_flow(maps(1, 2, 3, 4), [maps(1, 4, 3, 3)], temperature=0.1)],
    "min_max_matmul": lambda: [cvg.min_max_matmul(maps(1, 3, 4), maps(1, 4, 5), 0.1)],
    "token_peaks": lambda: [cvg.token_peaks(maps(1, 2, 3, 4, 5))],
    "max_flow": lambda: [cvg.subgraph_max_flow(maps(1, 2, 3, 4), [maps(1, 4, 3, 3)])[0]],
}


@pytest.mark.parametrize(
    "operation", [pytest.param(o, marks=pytest.mark.gpu) if DEVICE.type == "cuda" else o for o in CALLS]
)
def test_a_backward_pass_in_another_thread_is_seen(operation):
    with cvg.trace_backends() as ran:
        outputs = [output for output in CALLS[operation]() if output is not None]
        (forward,) = ran
        loss = sum(output.sum() for output in outputs)
        elsewhere(loss.backward)
    if forward[1] == "reference" and len(ran) == 1:
        pytest.skip("the reference served: plain PyTorch, whose backward pass is autograd's own")
    assert ran == [forward, (f"{operation}_backward", forward[1])]


def test_a_record_ends_with_its_block():
    with cvg.trace_backends() as ran:
        flow = CALLS["path_flow"]()[0]
    before = list(ran)
    elsewhere(flow.sum().backward)
    assert ran == before != []


def test_the_record_of_the_running_context_comes_first():
    with cvg.trace_backends() as outer:
        flow = CALLS["token_peaks"]()[0]
        before = list(outer)

        def backward():
            with cvg.trace_backends() as inner:
                flow.sum().backward()
            return inner

        assert [name for name, _ in elsewhere(backward)] == ["token_peaks_backward"]
        assert outer == before
