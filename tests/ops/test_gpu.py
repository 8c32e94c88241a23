"""How kernels are called on a GPU: any device, no waiting for it, in CUDA graphs, compiled, and the same in every run.

What they compute is tested where the operations are. `every_kernel` is also what `make gpu` runs under
compute-sanitizer.
"""

from __future__ import annotations

import pytest
import torch

import cvg_kernels as cvg
from cvg_kernels.backends import OPERATIONS, Backend, unavailable_reason
from cvg_kernels.kernels import TRITON_BACKENDS
from tests.ops.backends import DEVICE, backends, device_of
from tests.ops.layers import LAYERS, assert_close, grads_of, results

CUDA = torch.device("cuda", 0)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
#: Operations whose kernels check what they are given, which waits for the GPU.
CHECKED = {"max_flow"}


def kernels(*, but: set[str] = frozenset()) -> list:
    """(layer, backend) of all kernels; the operation is the first word of the layer's name."""
    found = []
    for name in LAYERS:
        operation = name.partition(" ")[0]
        if operation in but:
            continue
        there = backends(operation)
        for one in there:
            (backend,) = one.values
            skipped = backend == "reference" or (backend == "stock" and "bias" in name)
            marks = one.marks
            if backend == Backend.TRITON_SPECIALISED.value:
                # It takes 16 bits and head_dim 64, which layers have on a GPU, and only Hopper.
                skipped = name != "attention wide" or DEVICE.type != "cuda"
                marks = [*marks, pytest.mark.skipif(not HOPPER, reason="this GPU is no Hopper")]
            if not skipped:
                found.append(pytest.param(name, backend, marks=marks, id=f"{name}-{backend}"))
    return found


def gpu_kernels(*, but: set[str] = frozenset()) -> list:
    """As `kernels`, those that run on a GPU, skipped elsewhere."""
    on_gpu = (*(one.value for one in TRITON_BACKENDS), Backend.CUDA.value, Backend.STOCK.value)
    return [
        pytest.param(*one.values, marks=[*one.marks, pytest.mark.gpu], id=one.id)
        for one in kernels(but=but)
        if one.values[1] in on_gpu
    ]


@pytest.mark.drawn(12)
@pytest.mark.parametrize(("name", "backend"), kernels())
def test_every_kernel_on_a_small_odd_layer(name, backend):
    layer, device = LAYERS[name], device_of(backend)
    inputs = layer.inputs(device)
    grads = grads_of(layer, inputs)
    wanted = results(layer, [t.double() for t in inputs], [g.double() for g in grads], "reference")
    assert_close(results(layer, inputs, grads, backend), wanted, layer.tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
@pytest.mark.parametrize(("name", "backend"), gpu_kernels())
def test_tensors_on_another_gpu_than_the_current_one(name, backend):
    layer, other = LAYERS[name], torch.device("cuda", 1)
    inputs = layer.inputs(CUDA)
    grads = grads_of(layer, inputs)
    with torch.cuda.device(0):
        wanted = results(layer, inputs, grads, backend)
        there = [t.to(other) for t in inputs], [g.to(other) for g in grads]
        found = results(layer, *there, backend)
        assert torch.cuda.current_device() == 0
    assert all(tensor.device == other for tensor in found)
    assert_close(found, wanted, layer.tolerance)


@pytest.mark.parametrize(("name", "backend"), gpu_kernels(but=CHECKED))
def test_a_call_does_not_wait_for_the_gpu(name, backend):
    """After the first one, which compiles and keeps what lists become."""
    layer = LAYERS[name]
    inputs = layer.inputs(CUDA)
    grads = grads_of(layer, inputs)
    wanted = results(layer, inputs, grads, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = results(layer, inputs, grads, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(found, wanted, layer.tolerance)


def captured(call):
    """The CUDA graph of a call, and what it returned;
    the call has run before, on another stream, as torch asks for.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return graph, kept


@pytest.mark.parametrize(("name", "backend"), gpu_kernels(but=CHECKED))
def test_forward_and_backward_in_a_cuda_graph(name, backend):
    """A replay computes with what the inputs hold then."""
    layer = LAYERS[name]
    inputs, later = layer.inputs(CUDA), layer.inputs(CUDA)
    grads = grads_of(layer, inputs)
    graph, found = captured(lambda: results(layer, inputs, grads, backend))
    wanted = results(layer, later, grads, backend)
    for tensor, new in zip(inputs, later, strict=True):
        tensor.copy_(new)
    graph.replay()
    assert_close(found, wanted, layer.tolerance)


@pytest.mark.gpu
def test_a_guided_step_in_a_cuda_graph():
    """Cross-attention with maps, temporal attention with maps, flow, its peaks, a gradient in the latents, the mix."""
    positions, frames, width = (4, 6), 5, 32
    weights = [torch.randn(width, width, device=CUDA) / width**0.5 for _ in range(4)]
    text = torch.randn(frames, 2, 9, width // 2, device=CUDA)
    latents = torch.randn(frames, 24, width, device=CUDA)

    def heads(tensor):
        return tensor.unflatten(-1, (2, width // 2)).transpose(-3, -2)

    def step():
        given = latents.detach().requires_grad_()
        cross = cvg.attention_with_capture(heads(given @ weights[0]), text, text, [2, 5])
        hidden = cross.out.transpose(1, 2).flatten(2).transpose(0, 1)
        q, k, v = (heads(hidden @ weight) for weight in weights[1:])
        temporal = cvg.temporal_attention(q, k, v, sigma=2.0, capture=True)
        flow = cvg.path_flow(cross.maps.transpose(0, 1)[None], [temporal.maps[None]], temperature=0.01)
        peaks = cvg.token_peaks(flow.unflatten(-1, positions))
        (grad,) = torch.autograd.grad(-peaks.min(-1).values.sum(), given)
        guided = latents - 0.1 * grad
        return cvg.guidance_mix([latents, guided], [7.5]), peaks.detach(), grad

    graph, found = captured(step)
    latents.copy_(torch.randn_like(latents))
    wanted = step()
    graph.replay()
    assert_close(list(found), list(wanted), 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["attention", "temporal_attention"])
def test_compiled_in_one_graph(name):
    layer = LAYERS[name]
    inputs = layer.inputs(CUDA)
    grads = grads_of(layer, inputs)
    wanted = results(layer, inputs, grads, "auto")
    compiled = layer._replace(call=torch.compile(layer.call, fullgraph=True))
    assert_close(results(compiled, inputs, grads, "auto"), wanted, layer.tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("by_argument", [True, False], ids=["argument", "torch's flag"])
def test_deterministic_gradients_are_the_same_in_every_run(by_argument):
    """On keys long enough that torch's fused attention, whose sums come in any order, would serve otherwise."""
    leaves = [
        torch.randn(1, 2048, 4, 64, device=CUDA, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]
    grad = torch.randn_like(leaves[0])
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not by_argument)
    try:
        runs = []
        for _ in range(5):
            with cvg.trace_backends() as ran:
                out = cvg.attention_with_capture(*leaves, [3, 7], deterministic=True if by_argument else None).out
                runs.append(torch.autograd.grad(out, leaves, grad))
            (backward,) = (who for what, who in ran if what == "attention_backward")
            assert backward != "stock"
    finally:
        torch.use_deterministic_algorithms(before)
    for run in runs[1:]:
        assert all(torch.equal(have, want) for have, want in zip(run, runs[0], strict=True))


@pytest.mark.gpu
def test_every_kernel_of_a_gpu_is_tested_here():
    """A GPU kernel that the table has and this machine can run is one of the parameters above."""
    tested = {(name.partition(" ")[0], backend) for name, backend in (one.values for one in gpu_kernels())}
    for operation, there in OPERATIONS.items():
        for backend in there:
            if backend in (Backend.REFERENCE, Backend.NATIVE):
                continue
            if unavailable_reason(operation, backend, DEVICE) is None:
                assert (operation, backend.value) in tested
