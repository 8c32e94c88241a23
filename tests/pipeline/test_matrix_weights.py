"""Methods on networks whose weights are moved or cast around each forward:
accelerate's hooks and those of diffusers.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from tests.pipeline.matrix import METHODS, ROUNDING, WORDS, Built  # noqa: E402
from tests.pipeline.snapshot import Snapshot  # noqa: E402
from tests.pipelines import PIPELINES, SAME, denoisers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["animatediff", "latte", "wan22", "cogvideox"]
#: One that moves the latents by a gradient, one that changes layers, one that changes modules and calls the network
#: again.
CHOSEN = ["vico", "vstar", "synopsis", "gen1"]
CPU = torch.device("cpu")


def accepted(name):
    return [METHODS[key] for key in CHOSEN if not METHODS[key].refused(PIPELINES[name])]


def guided(built, method, strength=1):
    with method(built, strength).attach(built.pipe) as run:
        video = built.run()
    assert run.guided == (built.guided(0, method.stop) if strength or method.counts else [])
    return video


def maps_of(built):
    with cvg.capture(built.pipe, WORDS) as captured:
        built.run()
    return captured.heat_map("cat")


@contextmanager
def model_offload(pipe):
    """As `enable_model_cpu_offload` does it, onto the device that there is."""
    for denoiser in denoisers(pipe):
        accelerate.cpu_offload_with_hook(denoiser, execution_device=CPU)
    yield
    for denoiser in denoisers(pipe):
        remove_hook_from_module(denoiser)


@contextmanager
def aligned(pipe):
    """Hooks that move every layer's inputs."""
    for denoiser in denoisers(pipe):
        add_hook_to_module(denoiser, AlignDevicesHook(CPU, io_same_device=True))
        for module in denoiser.modules():
            if hasattr(module, "set_processor"):
                add_hook_to_module(module, AlignDevicesHook(CPU))
    yield
    for denoiser in denoisers(pipe):
        remove_hook_from_module(denoiser, recurse=True)


@contextmanager
def sequential_offload(pipe):
    """As `enable_sequential_cpu_offload`: the weights are there for the length of a layer's forward."""
    for denoiser in denoisers(pipe):
        accelerate.cpu_offload(denoiser, CPU)
    yield
    for denoiser in denoisers(pipe):
        remove_hook_from_module(denoiser, recurse=True)


@pytest.mark.parametrize("hooks", [model_offload, aligned, sequential_offload])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.drawn(8, of="long tests")
def test_hooks_of_accelerate_in_any_order(name, hooks):
    """Put on before the method or after it, taken off before it or after it: the same video, and nothing stays."""
    built = Built.of(name)
    with hooks(built.pipe):
        pass
    built.before = Snapshot(built.pipe)  # accelerate leaves each forward as an attribute
    orders = [(first, last) for first in ("hooks", "method") for last in ("hooks", "method")]
    for number, method in enumerate(accepted(name)):
        want = guided(built, method)
        for first, last in orders:
            # one method in every order; the others in turn in those that nest and those that overlap
            if number and (first == last) != bool(number % 2):
                continue
            managers = {"hooks": hooks(built.pipe), "method": method(built).attach(built.pipe)}
            second = "method" if first == "hooks" else "hooks"
            managers[first].__enter__()
            managers[second].__enter__()
            assert torch.equal(built.run(), want)
            rest = "method" if last == "hooks" else "hooks"
            managers[rest].__exit__(None, None, None)
            if rest == "hooks":
                assert torch.equal(built.run(), want)
            else:
                assert torch.equal(built.run(), built.stock)
            managers[last].__exit__(None, None, None)
            assert torch.equal(built.run(), built.stock)
        if hooks is not sequential_offload:  # which makes parameters anew
            built.is_as_before()
    usual = maps_of(built)
    with hooks(built.pipe):
        torch.testing.assert_close(maps_of(built), usual)


def group_offload(pipe, level, path):
    for number, denoiser in enumerate(denoisers(pipe)):
        blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
        folder = {"offload_to_disk_path": str(path / str(number))} if path else {}
        if path:
            (path / str(number)).mkdir()
        denoiser.enable_group_offload(CPU, CPU, level, **blocks, **folder)


@pytest.mark.parametrize(
    ("level", "place"), [("block_level", "memory"), ("leaf_level", "memory"), ("leaf_level", "disk")]
)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.drawn(8, of="long tests")
def test_group_offload(name, level, place, tmp_path):
    """Switched on while a method is attached and before: the video is the same.

    To the bit from memory. Weights read from a file lie at other addresses, where PyTorch's own products round
    otherwise.
    """
    disk = place == "disk"
    built = Built.of(name, double=disk)
    methods = accepted(name)
    want, maps = [guided(built, method) for method in methods], maps_of(built)
    same = SAME if disk else {"rtol": 0, "atol": 0}
    with methods[0](built).attach(built.pipe):
        group_offload(built.pipe, level, tmp_path if disk else None)
        torch.testing.assert_close(built.run(), want[0], **same)
    torch.testing.assert_close(built.run(), built.stock, **same)
    for method, video in zip(methods, want, strict=True):
        torch.testing.assert_close(guided(built, method), video, **same)
        torch.testing.assert_close(
            guided(built, method, 0), built.stock, rtol=1e-4, atol=0 if method.exact else ROUNDING
        )
    torch.testing.assert_close(maps_of(built), maps)
    torch.testing.assert_close(built.run(), built.stock, **same)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", FAMILIES)
def test_layerwise_casting(name):
    """Weights stored in 8 bits are other weights; attached to before or after, they are the same."""
    built = Built.of(name)
    methods = accepted(name)
    with methods[0](built).attach(built.pipe):
        for denoiser in denoisers(built.pipe):
            denoiser.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        attached_before = built.run()
    built.stock = built.run()
    assert torch.equal(guided(built, methods[0]), attached_before)
    for method in methods:
        video = guided(built, method)
        assert video.isfinite().all() and (video - built.stock).abs().max() > ROUNDING
        torch.testing.assert_close(
            guided(built, method, 0), built.stock, rtol=1e-4, atol=0 if method.exact else ROUNDING
        )
    with cvg.capture(built.pipe, WORDS) as captured:
        video = built.run()
    assert captured.records
    torch.testing.assert_close(video, built.stock, rtol=1e-4, atol=ROUNDING)
    weights = [p.dtype for d in denoisers(built.pipe) for p in d.parameters()]
    assert torch.float8_e4m3fn in weights
    assert torch.equal(built.run(), built.stock)
