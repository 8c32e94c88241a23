"""guidance_mix against the formula in float64, to the bit where it must be, on every backend that is here."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cvg_kernels as cvg
from cvg_kernels import native
from cvg_kernels.backends import Backend, unavailable_reason
from cvg_kernels.reference import guidance_mix as reference
from tests.ops.levels import EVERY_LEVEL
from tests.tolerance import assert_as_exact_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _backend(backend: Backend):
    reason = unavailable_reason("guidance_mix", backend, torch.device(DEVICE))
    marks = [pytest.mark.skipif(reason is not None, reason=str(reason))]
    return pytest.param(backend.value, marks=marks + [pytest.mark.gpu] * (DEVICE == "cuda"))


BACKENDS = [_backend(b) for b in (Backend.REFERENCE, Backend.NATIVE, Backend.TRITON)]
needs_native = pytest.mark.skipif(native.reason("cpu") is not None, reason=str(native.reason("cpu")))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(count: int, *shape: int, dtype=torch.float32, device: str = DEVICE) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for _ in range(count)]


def by_weights(predictions, scales, rescale=0.0):
    """Σ w_i p_i with w_i = s_i − s_{i+1}, in float64: the same sum in another order."""
    columns = [
        torch.as_tensor(s, dtype=torch.float64, device=predictions[0].device).expand(len(predictions[0]))
        for s in (1.0, *scales, 0.0)
    ]
    mix = 0
    for p, left, right in zip(predictions, columns, columns[1:], strict=False):
        mix = mix + (left - right).view(-1, *[1] * (p.ndim - 1)) * p.double()
    if rescale:
        ratio = predictions[-1].double().flatten(1).std(1) / mix.flatten(1).std(1)
        mix = mix * (rescale * ratio + 1 - rescale).view(-1, *[1] * (mix.ndim - 1))
    return mix


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, scales",
    [
        ((2, 4, 3, 5, 7), (7.5,)),
        ((3, 1100), (1.7, -2.0)),
        ((1, 4, 16, 9), (1.0, 0.0)),
        ((2, 2, 1030), (0.5, 1.0, 3.0)),
    ],
    ids=str,
)
def test_against_float64(backend, dtype, shape, scales):
    predictions = draw(len(scales) + 1, *shape, dtype=dtype)
    with cvg.trace_backends() as ran:
        mix = cvg.guidance_mix(predictions, scales, backend=backend)
    assert ran == [("guidance_mix", backend)] and mix.dtype == dtype and mix.shape == shape
    stock = predictions[0]  # in the inputs' own dtype, as a pipeline computes it
    for scale, before, after in zip(scales, predictions, predictions[1:], strict=False):
        stock = stock + scale * (after - before)
    assert_as_exact_as(mix, stock, by_weights(predictions, scales), size=max(map(abs, scales)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_one_leaves_no_trace(backend):
    """Temporal scale 1 is classifier-free guidance to the bit, also where differences would round."""
    image, uncond, cond = draw(3, 2, 4, 3, 33)
    image = image * 1e4
    written_out = uncond + 7.5 * (cond - uncond)
    assert not torch.equal(image + 1.0 * (uncond - image), uncond)
    for scales in ([1.0, 7.5], [torch.ones(2), torch.full((2,), 7.5)]):
        mix = cvg.guidance_mix([image, uncond, cond], scales, backend=backend)
        assert torch.equal(mix, written_out)
    assert torch.equal(cvg.guidance_mix([image, uncond], [1], backend=backend), uncond)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_the_expression_written_out(backend):
    """No fused multiply-add: the same two roundings as PyTorch's."""
    image, uncond, cond = draw(3, 2, 4, 3, 33)
    mix = cvg.guidance_mix([image, uncond, cond], [1.3, 7.5], backend=backend)
    assert torch.equal(mix, image + 1.3 * (uncond - image) + 7.5 * (cond - uncond))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_scales_per_sample(backend, count):
    """Each sample as with its own numbers, to the bit; one of them telescopes, one not, one at another step."""
    predictions = draw(count, 3, 4, 21)
    table = torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 3.0], [5.0, 1.0, 1.0]], device=DEVICE)
    scales = [*table[: count - 2], 2.5] if count > 2 else [table[0]]
    mix = cvg.guidance_mix(predictions, scales, backend=backend)
    for sample in range(3):
        numbers = [float(s[sample]) if torch.is_tensor(s) else s for s in scales]
        own = [p[sample : sample + 1] for p in predictions]
        assert torch.equal(mix[sample : sample + 1], cvg.guidance_mix(own, numbers, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    """Chunks, permuted and strided tensors: the same numbers, and dense ones keep their order in memory."""
    stacked = torch.randn(2, 3, 4, 5, 6, device=DEVICE)
    permuted = torch.randn(4, 3, 5, 2, device=DEVICE).permute(0, 3, 1, 2)
    cases = {
        "chunks": stacked.chunk(2),
        "permuted": permuted.chunk(2),
        "batch inside": torch.randn(5, 2, 3, 2, device=DEVICE).permute(1, 0, 2, 3).unbind(-1),
        "batch last": [torch.randn(5, 3, device=DEVICE).T for _ in range(2)],
        "unlike": [torch.randn(2, 3, 4, device=DEVICE), torch.randn(4, 3, 2, device=DEVICE).permute(2, 1, 0)],
        "expanded": [torch.randn(1, 3, device=DEVICE).expand(2, 3), torch.randn(2, 3, device=DEVICE)],
    }
    for name, (uncond, cond) in cases.items():
        mix = cvg.guidance_mix([uncond, cond], [3.0], backend=backend)
        assert torch.equal(mix, uncond + 3.0 * (cond - uncond)), name
        assert mix.stride() == torch.empty_like(uncond).stride(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_and_the_smallest(backend):
    for shape in ((0, 4), (2, 0), (1,), (3, 1)):
        mix = cvg.guidance_mix(draw(2, *shape), [2.0], backend=backend)
        assert mix.shape == shape and torch.isfinite(mix).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_is_no_input(backend):
    """A caller that changes the result in place must not change a prediction."""
    predictions = draw(2, 2, 3)
    mix = cvg.guidance_mix(predictions, [1.0], backend=backend)
    assert mix.data_ptr() not in {p.data_ptr() for p in predictions}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_rescale(backend, dtype):
    """Against float64, and against diffusers' own function where it is exact enough to tell."""
    uncond, cond = draw(2, 3, 4, 3, 500, dtype=dtype)
    cond = cond + 0.5  # a mean that is not zero
    mix = cvg.guidance_mix([uncond, cond], [9.0], rescale=0.7, backend=backend)
    exact = by_weights([uncond, cond], [9.0], 0.7)
    bound = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    assert (mix.double() - exact).abs().max() <= bound * exact.abs().max()
    if dtype == torch.float32:
        diffusers = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
        theirs = diffusers.rescale_noise_cfg(uncond + 9.0 * (cond - uncond), cond, 0.7)
        torch.testing.assert_close(mix, theirs, rtol=1e-5, atol=1e-5)


@needs_native
def test_float64_on_the_cpu():
    predictions = [t.double() for t in draw(3, 2, 700, device="cpu")]
    with cvg.trace_backends() as ran:
        mix = cvg.guidance_mix(predictions, [1.5, 7.5], rescale=0.3)
    assert ran == [("guidance_mix", "native")] and mix.dtype == torch.float64
    torch.testing.assert_close(mix, by_weights(predictions, [1.5, 7.5], 0.3), rtol=1e-13, atol=1e-13)


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    scales=st.lists(st.sampled_from([0.0, 1.0, 1.0, -2.0, 7.5]), min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
)
def test_native_is_the_reference_to_the_bit(shape, scales, seed):
    generator = torch.Generator().manual_seed(seed)
    predictions = [torch.randn(shape, generator=generator) for _ in range(len(scales) + 1)]
    mix = cvg.guidance_mix(predictions, scales, backend="native")
    assert torch.equal(mix, reference.guidance_mix(predictions, scales))


@needs_native
def test_threads_do_not_change_a_bit():
    predictions = draw(2, 2, 200_000, device="cpu")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(cvg.guidance_mix(predictions, [7.5], rescale=0.7, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


_LEVEL_CHECK = """
import torch, cvg_kernels as cvg
from cvg_kernels import native
from cvg_kernels.reference import guidance_mix as reference
assert native.load("cpu").isa() == {level!r}
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for elements in (1, 37, 5000):
        p = [torch.randn(2, elements).to(dtype) for _ in range(4)]
        for scales in ([7.5], [1.5, 7.5], [1.5, 7.5, 0.2]):
            p_n = p[:len(scales) + 1]
            assert torch.equal(cvg.guidance_mix(p_n, scales, backend="native"), reference.guidance_mix(p_n, scales))
"""


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("level", EVERY_LEVEL)
def test_every_level_of_this_machine(level, fresh, tmp_path):
    fresh.right(_LEVEL_CHECK.format(level=level), tmp_path, CVG_CPU_ISA=level)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients(backend, per_sample):
    """Those of the formula in float64; the map is linear, so second derivatives are zero and allowed."""
    predictions = [t.requires_grad_() for t in draw(3, 2, 4, 5)]
    scales = [1.0, 7.5]
    if per_sample:
        scales = [torch.tensor([1.0, 2.0], device=DEVICE), 7.5]
    cotangent = torch.randn(2, 4, 5, device=DEVICE)
    found = torch.autograd.grad(
        cvg.guidance_mix(predictions, scales, backend=backend),
        predictions,
        cotangent,
        create_graph=True,
        materialize_grads=True,
    )
    exact = [t.detach().double().requires_grad_() for t in predictions]
    wanted = torch.autograd.grad(by_weights(exact, scales), exact, cotangent.double())
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-6, atol=1e-6)


def test_gradients_of_rescale_and_scales_come_from_the_reference():
    predictions = [t.double().requires_grad_() for t in draw(3, 2, 6)]
    scales = torch.tensor([[1.0, 1.3], [2.0, 1.0]], dtype=torch.float64, device=DEVICE)
    scales.requires_grad_()

    def mix(scales, *predictions):
        return cvg.guidance_mix(predictions, list(scales), rescale=0.4)

    with cvg.trace_backends() as ran:
        mix(scales, *predictions)
    assert ran == [("guidance_mix", "reference")]
    assert torch.autograd.gradcheck(mix, (scales, *predictions))
    if unavailable_reason("guidance_mix", Backend.NATIVE, torch.device(DEVICE)) is None:
        with pytest.raises(cvg.ArgumentError, match="differentiated by backend 'reference' only"):
            cvg.guidance_mix(predictions, [1.0, 2.0], rescale=0.4, backend="native")


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_registration(per_sample, needs_grad):
    predictions = [t.requires_grad_(needs_grad) for t in draw(3, 2, 4, 5)]
    sample_scales = torch.rand(2, 2, device=DEVICE) if per_sample else None
    torch.library.opcheck(
        torch.ops.cvg_kernels.guidance_mix.default,
        (predictions, None if per_sample else [1.0, 7.5], sample_scales, 0.0, "auto"),
    )


def test_compiles_in_one_graph():
    compiled = torch.compile(
        lambda a, b, c: cvg.guidance_mix([a, b, c], [1.5, 7.5]), fullgraph=True, backend="aot_eager"
    )
    for size in (5, 9):
        predictions = [t.requires_grad_() for t in draw(3, 2, size)]
        found, want = compiled(*predictions), cvg.guidance_mix(predictions, [1.5, 7.5])
        assert torch.equal(found, want)
        for mine, right in zip(
            torch.autograd.grad(found.sum(), predictions), torch.autograd.grad(want.sum(), predictions), strict=True
        ):
            assert torch.equal(mine, right)


_STATIC_CHECK = """
import re, subprocess, tempfile, pathlib
import torch, triton
from triton.backends.compiler import GPUTarget
from cvg_kernels._triton.guidance_mix import launch
tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
for dtype in (torch.float32, torch.bfloat16):
    for scales, sample_scales in (((1.5, 7.5), None), (None, torch.empty(2, 2, device="meta"))):
        p = [torch.empty(2, 4, 16, 40, 64, dtype=dtype, device="meta") for _ in range(4)]
        job = launch(p[:3], scales, sample_scales, p[3])
        assert job.compile(GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]
        for arch in (80, 90, 100):
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(job.compile(GPUTarget("cuda", arch, 32)).asm["cubin"])
                file.flush()
                code = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
            assert "FMUL" in code and not re.findall("FFMA|LDL|STL", code), code
"""


@pytest.mark.drawn(8, of="long tests")
def test_the_triton_kernel_on_gpus_that_are_not_here(fresh, tmp_path):
    """It compiles, does not spill, and fuses no product with a sum."""
    pytest.importorskip("triton")
    fresh.right(_STATIC_CHECK, tmp_path, TRITON_INTERPRET=None)


def test_triton_refuses_what_it_has_no_kernel_for():
    if unavailable_reason("guidance_mix", Backend.TRITON, torch.device(DEVICE)) is not None:
        pytest.skip("no Triton here")
    for predictions, options in (
        (draw(5, 2, 3), {}),
        (draw(2, 2, 3, dtype=torch.float64), {}),
        (draw(2, 2, 3), {"rescale": 0.5}),
    ):
        scales = [2.0] * (len(predictions) - 1)
        with pytest.raises(cvg.ArgumentError, match="is not supported by backend 'triton'"):
            cvg.guidance_mix(predictions, scales, backend="triton", **options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"predictions": [torch.ones(2)]}, "predictions must be at least two tensors, got 1"),
        ({"predictions": [torch.ones(2), 3]}, r"predictions\[1\] must be a tensor, got 3"),
        ({"predictions": [torch.ones(2), torch.ones(3)]}, r"predictions\[1\] must be as predictions\[0\]"),
        ({"predictions": [torch.ones(2), torch.ones(2).half()]}, r"predictions\[1\] must be as"),
        ({"predictions": [torch.ones(2).int()] * 2}, r"predictions\[0\] must be float32"),
        ({"predictions": [torch.tensor(1.0)] * 2}, r"predictions\[0\] must be .* \[B, …\]"),
        ({"scales": [1.0, 2.0]}, "scales must be one fewer than the 2 predictions, got 2"),
        ({"scales": ["high"]}, r"scales\[0\] must be a number or a tensor \[B\], got 'high'"),
        ({"scales": [torch.ones(3)]}, r"scales\[0\] must be a number or a tensor \[B\] = \(2,\), got \(3,\)"),
        ({"rescale": 1.5}, r"rescale must lie in \[0, 1\], got 1.5"),
        ({"backend": "gpu"}, "backend must be one of"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"predictions": [torch.ones(2), torch.ones(2)], "scales": [2.0]} | change
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.guidance_mix(**arguments)


def test_an_absent_backend_is_named():
    with pytest.raises(cvg.BackendUnavailableError, match="guidance_mix has no cuda kernel"):
        cvg.guidance_mix(draw(2, 2), [2.0], backend="cuda")


@pytest.mark.drawn(8, of="long tests")
def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    from cvg_kernels.cli import main

    monkeypatch.setattr(torch, "compile", lambda function: function)  # its time is not ours
    file = tmp_path / "figures.json"
    assert main(f"bench guidance_mix --quick --rounds 2 --json {file}".split()) == 0
    (latents,) = json.loads(file.read_text())["latents"]
    assert set(latents["seconds"]) == {"classifier-free", "Gen-1", "with rescale"}
    for seconds in latents["seconds"].values():
        assert set(seconds) == {"eager", "torch.compile", "cvg_kernels"}
        assert all(took > 0 for took in seconds.values())
    assert "Gen-1" in capsys.readouterr().out
