"""Every operation under every way to differentiate, batch and trace it: the right numbers or a clear refusal, never a
zero.

Right is what the reference gives in reverse mode. Kernels have a gradient in reverse mode only, so under torch.func
and in forward mode `auto` is the reference and a kernel asked for by name refuses.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import cvg_kernels as cvg
from cvg_kernels.backends import Backend, unavailable_reason
from tests.differences import SHARPEST, slope_of

BACKENDS = ["auto", "reference", "native"]
DERIVATIVES = ["grad", "vjp", "jvp", "forward", "jacobian"]


def near(*shape):
    return torch.rand(*shape, dtype=torch.float64)


def rows(*shape):
    return torch.randn(*shape, dtype=torch.float64).softmax(-1)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


#: operation → its floating-point arguments, and a call of it
CASES = {
    "attention": (
        lambda: [normal(2, 2, 4, 6), normal(2, 2, 5, 6), normal(2, 2, 5, 6)],
        lambda q, k, v, **o: cvg.attention_with_capture(q, k, v, [1, 4], **o),
    ),
    "capture_maps": (
        lambda: [normal(2, 2, 4, 6), normal(2, 2, 5, 6)],
        lambda q, k, **o: cvg.capture_maps(q, k, [1, 4], **o),
    ),
    "temporal_attention": (
        lambda: [normal(3, 2, 4, 6), normal(3, 2, 4, 6), normal(3, 2, 4, 6), near(()) + 1],
        lambda q, k, v, sigma, **o: cvg.temporal_attention(q, k, v, sigma=sigma, capture=True, **o),
    ),
    "temporal_maps": (
        lambda: [normal(1, 2, 7, 4), normal(1, 2, 7, 4), normal(1, 2, 7).abs() + 3],
        lambda q, k, lse, **o: cvg.temporal_maps(q, k, lse, (3, 1, 2), query_start=1, key_start=1, **o),
    ),
    "frame_band_attention": (
        lambda: [normal(2, 2, 4, 6), normal(2, 2, 5, 6), normal(2, 2, 5, 6)],
        lambda q, k, v, **o: cvg.frame_band_attention(q, k, v, [0, 0, 1, 1], [0, 0, 1, 1, 2], sigma=1.0, **o),
    ),
    "path_flow": (
        lambda: [near(2, 3, 4, 5), rows(2, 5, 4, 4), rows(2, 5, 4, 4)],
        lambda x, *hops, **o: cvg.path_flow(x, hops, temperature=0.1, **o),
    ),
    "min_max_matmul": (lambda: [near(2, 3, 4), near(2, 4, 5)], lambda a, b, **o: cvg.min_max_matmul(a, b, 0.1, **o)),
    "token_peaks": (lambda: [near(2, 3, 4, 3, 3)], lambda flow, **o: cvg.token_peaks(flow, sharpness=5.0, **o)),
    "guidance_mix": (
        lambda: [normal(2, 3, 4), normal(2, 3, 4)],
        lambda a, b, **o: cvg.guidance_mix([a, b], [7.5], **o),
    ),
    "max_flow": (lambda: [near(3, 5, 5)], lambda capacity, **o: cvg.max_flow(capacity, 0, 4, **o)),
    "subgraph_max_flow": (
        lambda: [near(2, 3, 4, 5), rows(2, 5, 4, 4), rows(2, 5, 4, 4)],
        lambda x, *hops, **o: cvg.subgraph_max_flow(x, hops, **o),
    ),
    "coupled_max_flow": (
        lambda: [near(1, 2, 3, 4), rows(1, 3, 4, 4), rows(1, 4, 3, 3)],
        lambda x, spatial, hop, **o: cvg.coupled_max_flow(x, [hop], spatial, **o),
    ),
    "depth_structure": (lambda: [normal(2, 3, 8, 9)], lambda depth, **o: cvg.depth_structure(depth, 2, **o)),
}
#: Their kernels take lists of tensors, which vmap cannot split.
LISTS = ("path_flow", "guidance_mix", "subgraph_max_flow", "coupled_max_flow")
#: Their reference reads the numbers to find the flow.
READING = ("max_flow", "subgraph_max_flow", "coupled_max_flow")
#: Their gradient is made of plain PyTorch.
TWICE = ("guidance_mix", "coupled_max_flow", "depth_structure")


@pytest.fixture(params=CASES)
def case(request):
    made, call = CASES[request.param]
    return request.param, call, made()


@pytest.fixture(params=BACKENDS)
def backend(request, case):
    if request.param == "native":
        key = {"capture_maps": "attention", "subgraph_max_flow": "max_flow"}
        reason = unavailable_reason(key.get(case[0], case[0]), Backend.NATIVE)
        if reason is not None:
            pytest.skip(reason)
    return request.param


def numbers(result) -> list[torch.Tensor]:
    """The floating-point tensors of a result."""
    parts = result if isinstance(result, tuple) else (result,)
    return [part for part in parts if part is not None and part.is_floating_point()]


def weighted(call, weights, **options):
    """A scalar that every number of the result moves."""
    return lambda *tensors: sum(
        (weight * part).sum() for weight, part in zip(weights, numbers(call(*tensors, **options)), strict=True)
    )


def losses(case, backend):
    """The loss by a backend and by the way that is right, which for a coupled flow is the kernel in reverse mode."""
    _, call, tensors = case
    with torch.no_grad():
        weights = [torch.randn_like(part) for part in numbers(call(*tensors))]
    return weighted(call, weights, backend=backend), weighted(call, weights)


def reverse(loss, tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(loss(*leaves), leaves)


def derivative(mode, loss, tensors, tangents):
    """By one of `DERIVATIVES`: what should be the gradient, or (last) the derivative along the tangents."""
    everything = tuple(range(len(tensors)))
    if mode == "grad":
        return torch.func.grad(loss, argnums=everything)(*tensors)
    if mode == "vjp":
        value, pull = torch.func.vjp(loss, *tensors)
        return pull(torch.ones_like(value))
    if mode == "jacobian":
        return torch.func.jacrev(loss, argnums=everything)(*tensors)
    if mode == "jvp":
        return [torch.func.jvp(loss, tuple(tensors), tuple(tangents))[1]]
    with forward_ad.dual_level():
        given = [forward_ad.make_dual(t, v) for t, v in zip(tensors, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(loss(*given)).tangent
        assert tangent is not None, "the tangent was lost"
        return [tangent.clone()]


@pytest.mark.drawn(6)
@pytest.mark.parametrize("mode", DERIVATIVES)
def test_derivatives_of_torch_func_and_forward_mode(mode, case, backend):
    name, _, tensors = case
    loss, right = losses(case, backend)
    tangents = [torch.randn_like(tensor) for tensor in tensors]
    if name == "coupled_max_flow":
        with pytest.raises(cvg.BackendUnavailableError, match="torch.autograd.grad differentiates"):
            derivative(mode, loss, tensors, tangents)
        return
    if backend == "native":
        refused = "structure has no native" if name == "depth_structure" else "'reference' is plain"
        with pytest.raises(cvg.BackendUnavailableError, match=refused):
            derivative(mode, loss, tensors, tangents)
        return
    wanted = reverse(right, tensors)
    if mode in ("jvp", "forward"):
        wanted = [sum((g * t).sum() for g, t in zip(wanted, tangents, strict=True))]
    found = derivative(mode, loss, tensors, tangents)
    assert any(part.any() for part in found)
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, want)


def test_second_derivatives(case, backend):
    """Of the square of the loss, along one line, against differences of gradients, whose width and budget come from
    the loss."""
    name, _, tensors = case
    if backend == "native" and name == "depth_structure":
        pytest.skip("it has no kernel")
    loss, _ = losses(case, backend)
    lines = [torch.randn_like(tensor) for tensor in tensors]

    def slope(tensors, create_graph=False):
        grads = torch.autograd.grad(loss(*tensors).square(), tensors, create_graph=create_graph)
        return sum((g * line).sum() for g, line in zip(grads, lines, strict=True))

    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    if backend != "reference" and name not in TWICE:
        with pytest.raises(RuntimeError, match="backend='reference'"):
            torch.autograd.grad(slope(leaves, create_graph=True), leaves)
        return
    grads = torch.autograd.grad(slope(leaves, create_graph=True), leaves)
    found = sum((g * line).sum() for g, line in zip(grads, lines, strict=True))

    def along(distance):
        return slope([(t + distance * line).requires_grad_() for t, line in zip(tensors, lines, strict=True)]).item()

    length = (sum(t.square().sum() for t in tensors) / sum(line.square().sum() for line in lines)).sqrt().item()
    told = slope_of(along, torch.finfo(torch.float64).eps, length, found.item())
    terms = sum((g * line).abs().sum() for g, line in zip(grads, lines, strict=True)).item()
    assert told.budget <= SHARPEST * max(abs(told.value), terms), f"differences cannot tell: {told}"
    rounding = 1e-12 * terms  # of the sum that is claimed
    assert abs(found.item() - told.value) <= told.budget + rounding, f"{found.item():.6g}, by differences {told}"


def test_vmap_and_a_gradient_through_it(case, backend):
    name, call, tensors = case
    if backend == "native" and name == "depth_structure":
        pytest.skip("it has no kernel")
    pairs = [torch.stack([tensor, tensor + 0.01]).requires_grad_() for tensor in tensors]

    def mapped():
        return torch.vmap(lambda *one: tuple(numbers(call(*one, backend=backend))))(*pairs)

    by_kernel = backend == "native" or (backend == "auto" and name in READING)
    if by_kernel and name in LISTS or backend == "reference" and name in READING:
        with pytest.raises(cvg.BackendUnavailableError, match=r"cannot run .* under torch.vmap"):
            mapped()
        return
    singles = [numbers(call(*(pair[at] for pair in pairs))) for at in range(2)]
    wanted = [torch.stack(parts) for parts in zip(*singles, strict=True)]
    found = mapped()
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, want)
    grads = [torch.autograd.grad(sum(part.square().sum() for part in parts), pairs) for parts in (found, wanted)]
    for have, want in zip(*grads, strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, case, backend):
    name, call, tensors = case
    if backend == "native" and name == "depth_structure":
        pytest.skip("it has no kernel")
    leaves = [tensor.requires_grad_() for tensor in tensors]
    wanted = numbers(call(*leaves))
    with mode():
        found = numbers(call(*leaves, backend=backend))
    for have, want in zip(found, wanted, strict=True):
        assert not have.requires_grad and have.is_inference() == (mode is torch.inference_mode)
        torch.testing.assert_close(have, want.detach())


@pytest.mark.drawn(8, of="long tests")
def test_fake_tensors(case, backend):
    """Shapes and dtypes of results and gradients without a number."""
    name, call, tensors = case
    if backend == "native" and name == "depth_structure":
        pytest.skip("it has no kernel")
    wanted = numbers(call(*tensors))
    with FakeTensorMode() as mode:
        leaves = [mode.from_tensor(tensor).requires_grad_() for tensor in tensors]
        found = numbers(call(*leaves, backend=backend))
        grads = torch.autograd.grad(sum(part.sum() for part in found), leaves)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in wanted]
    assert [(t.shape, t.dtype) for t in grads] == [(t.shape, t.dtype) for t in tensors]


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_kernel_serves_constants_under_a_derivative(backend):
    """What takes no part in the transform around it is no reason to refuse."""
    cvg.backends.require("path_flow", Backend(backend), torch.device("cpu"))
    a, b = torch.rand(2, 3, 4), torch.rand(2, 4, 5)
    product = cvg.min_max_matmul(a, b, backend=backend)

    def loss(factor):
        return (factor * cvg.min_max_matmul(a, b, backend=backend)).sum()

    torch.testing.assert_close(torch.func.grad(loss)(torch.tensor(2.0)), product.sum())
    with pytest.raises(cvg.BackendUnavailableError, match=f"backend '{backend}' cannot run min_max"):
        torch.func.grad(lambda a: cvg.min_max_matmul(a, b, backend=backend).sum())(a)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "forward"])
def test_compiled(transform):
    """The transform inside the graph, or forward mode around it."""
    cross, hop = near(2, 3, 4, 5), rows(2, 5, 4, 4)

    def loss(x):
        return cvg.path_flow(x, [hop], temperature=0.1).sin().sum((0, 1, 2, 3))

    (gradient,) = reverse(loss, [cross])
    torch.compiler.reset()
    if transform == "forward":
        with forward_ad.dual_level():
            compiled = torch.compile(loss, backend="aot_eager")
            result = compiled(forward_ad.make_dual(cross, torch.ones_like(cross)))
            torch.testing.assert_close(forward_ad.unpack_dual(result).tangent, gradient.sum())
        return
    calls = {
        "grad": (lambda x: torch.func.grad(loss)(x), gradient),
        "jvp": (lambda x: torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1], gradient.sum()),
        "vmap": (lambda x: torch.vmap(loss)(torch.stack([x, x])), loss(cross).expand(2)),
    }
    call, wanted = calls[transform]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(cross), wanted)
