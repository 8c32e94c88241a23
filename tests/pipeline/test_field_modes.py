"""Modes that a pipeline may run in:
autocast, inference, compiled, cached, offloaded, cast, other attention kernels.
"""

from __future__ import annotations

import contextlib
import logging

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402
import torch  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from tests.pipeline.field import WORDS, Push, tree  # noqa: E402
from tests.pipelines import PIPELINES, denoisers, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

VICO = cvg.Vico(words=WORDS, stop=0.5, iterations=1)
FIVE = ["animatediff", "modelscope", "latte", "wan", "cogvideox"]


def heat(captured):
    return torch.stack([captured.heat_map(word) for word in WORDS])


def results(pipe, options, method=VICO):
    """The video under a method, the heat maps, and the losses."""
    with method.attach(pipe) as made, cvg.capture(pipe, words=WORDS) as captured:
        frames = run(pipe, options)
    losses = [entry["loss"] for entry in made.history if "loss" in entry]
    return frames, heat(captured), torch.stack(losses) if losses else torch.zeros(1)


# -- precision and gradients


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", ["animatediff", "wan"])
def test_maps_are_float32_under_autocast(name):
    pipe, options = PIPELINES[name].build()
    with cvg.capture(pipe, words=WORDS) as wanted:
        run(pipe, options, num_inference_steps=1)
    with torch.autocast("cpu", torch.bfloat16), cvg.capture(pipe, words=WORDS) as captured:
        run(pipe, options, num_inference_steps=1)
    assert {record.maps.dtype for record in captured.records} == {torch.float32}
    coarse = [record.maps.bfloat16().float() for record in captured.records]
    assert not any(torch.equal(record.maps, low) for record, low in zip(captured.records, coarse, strict=True))
    # The network itself is in bfloat16, with 8 bits: maps of its own queries and keys.
    torch.testing.assert_close(heat(captured), heat(wanted), rtol=0.1, atol=2.0**-6)


@pytest.mark.parametrize("name", ["animatediff", "wan"])
def test_latents_are_moved_under_autocast_too(name):
    pipe, options = PIPELINES[name].build()
    with torch.autocast("cpu", torch.bfloat16):
        stock = run(pipe, options)
        with VICO.attach(pipe) as made:
            frames = run(pipe, options)
    assert made.guided == [(0, 0), (0, 1)] and frames.isfinite().all()
    assert not torch.equal(frames, stock)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", FIVE)
def test_inference_mode_changes_nothing(name):
    """Rotary positions, texts and timesteps that were made in it can be saved for no backward pass."""
    pipe, options = PIPELINES[name].build()
    want = results(pipe, options)
    with torch.inference_mode():
        got = results(pipe, options)
    torch.testing.assert_close(got, want)


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        pipe, options = PIPELINES["wan"].build()
    with pytest.raises(cvg.ArgumentError, match="weights were made under torch.inference_mode"), VICO.attach(pipe):
        run(pipe, options)


# -- compiled networks


def whole_in_place(pipe, part):
    getattr(pipe, part).compile(backend="eager")


def whole(pipe, part):
    setattr(pipe, part, torch.compile(getattr(pipe, part), backend="eager"))


def blocks(pipe, part):
    getattr(pipe, part).compile_repeated_blocks(backend="eager")


def blocks_as_a_graph(pipe, part):
    getattr(pipe, part).compile_repeated_blocks(backend="eager", fullgraph=True)


COMPILING = [whole_in_place, whole, blocks, blocks_as_a_graph]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("when", ["before", "while", "between"])
@pytest.mark.parametrize("how", COMPILING, ids=lambda how: how.__name__)
@pytest.mark.drawn(12, of="compiled networks")
def test_a_compiled_network(how, when, caplog):
    """Compiled before it is attached to, while, or between two runs of a block: the same, and compiled again
    afterwards.
    """
    pipe, options = PIPELINES["wan"].build()
    options["num_inference_steps"] = 2
    stock, want = run(pipe, options), results(pipe, options)
    if when == "before":
        how(pipe, "transformer")
        run(pipe, options)
        before = tree(pipe)
        with caplog.at_level(logging.WARNING, "cvg_kernels"):
            got = results(pipe, options)
        assert not [record for record in caplog.records if "runs uncompiled" in record.message]
        assert tree(pipe) == before
    else:
        with VICO.attach(pipe) as made, cvg.capture(pipe, words=WORDS) as captured:
            if when == "between":
                run(pipe, options)
                made.history.clear()
            how(pipe, "transformer")
            frames = run(pipe, options)
        got = frames, heat(captured), torch.stack([entry["loss"] for entry in made.history])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(run(pipe, options), stock)
    compiled = [m for m in pipe.transformer.modules() if m._compiled_call_impl or hasattr(m, "_orig_mod")]
    assert compiled


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("method", "how"),
    [
        (VICO, whole),
        (cvg.Gen1(), whole),
        (cvg.Gen1(), whole_in_place),
        (cvg.VSTAR(sigma=1.0, trained_frames=3), whole),
        (cvg.VSTAR(sigma=1.0, trained_frames=3), whole_in_place),
    ],
    ids=lambda one: getattr(one, "__name__", type(one).__name__),
)
@pytest.mark.drawn(12, of="compiled networks")
def test_methods_on_a_compiled_unet(method, how):
    """Vico's maps and gradient are part of graphs; what the others change runs uncompiled."""
    pipe, options = PIPELINES["animatediff"].build()
    options["num_inference_steps"] = 2
    want = results(pipe, options, method)
    how(pipe, "unet")
    torch.testing.assert_close(results(pipe, options, method), want)


# -- kernels of attention


def set_before(pipe, backend):
    pipe.transformer.set_attention_backend(backend)
    return contextlib.nullcontext()


def process_wide(pipe, backend):
    return diffusers.attention_backend(backend)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("how", [set_before, process_wide], ids=lambda how: how.__name__)
@pytest.mark.parametrize("backend", ["flex", "_native_math"])
def test_another_backend_of_attention(backend, how):
    """While we take its place, the backend of a layer does not matter; the other layers keep it."""
    pipe, options = PIPELINES["wan"].build()
    want = results(pipe, options)
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    kept = registry._active_backend
    try:
        with how(pipe, backend):
            method = Push() if backend == "flex" else VICO
            plain = run(pipe, options)
            got = results(pipe, options, method)
            torch.testing.assert_close(run(pipe, options), plain)
    finally:
        registry._active_backend = kept
    if backend != "flex":
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    else:
        pipe.transformer.reset_attention_backend()
        torch.testing.assert_close(got, results(pipe, options, method), rtol=1e-3, atol=1e-4)


def test_a_backend_that_is_set_in_the_block_stays():
    pipe, options = PIPELINES["wan"].build()
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    kept = registry._active_backend
    try:
        with cvg.capture(pipe, words=WORDS), cvg.processors(pipe):
            run(pipe, options, num_inference_steps=1)
            pipe.transformer.set_attention_backend("_native_math")
            run(pipe, options, num_inference_steps=1)
        chosen = {p._attention_backend.value for p in pipe.transformer.attn_processors.values()}
        assert chosen == {"_native_math"}
    finally:
        registry._active_backend = kept


# -- weights that come and go


def offloaded_to_disk(network, folder):
    here = torch.device("cpu")
    network.enable_group_offload(
        onload_device=here, offload_device=here, offload_type="leaf_level", offload_to_disk_path=str(folder)
    )


def offloaded_by_blocks(network, folder):
    here = torch.device("cpu")
    network.enable_group_offload(
        onload_device=here, offload_device=here, offload_type="block_level", num_blocks_per_group=1
    )


def cast_by_layers(network, folder):
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.parametrize("how", [offloaded_to_disk, offloaded_by_blocks, cast_by_layers], ids=lambda how: how.__name__)
@pytest.mark.parametrize("name", FIVE)
@pytest.mark.drawn(8)
def test_weights_that_are_taken_away_after_the_forward(name, how, tmp_path):
    """The backward pass still has those that the forward used."""
    pipe, options = PIPELINES[name].build()
    network = denoisers(pipe)[0]
    if how is cast_by_layers:  # compare with weights that were rounded as the stored ones are
        how(network, tmp_path)
        rounded = {key: value.float() for key, value in network.state_dict().items()}
        pipe, options = PIPELINES[name].build()
        denoisers(pipe)[0].load_state_dict(rounded)
        want = results(pipe, options)
        pipe, options = PIPELINES[name].build()
    else:
        want = results(pipe, options)
    how(denoisers(pipe)[0], tmp_path)
    got = results(pipe, options)
    assert got[0].isfinite().all()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# -- caches


def first_block(threshold=0.5):
    return diffusers.FirstBlockCacheConfig(threshold=threshold)


def pyramid():
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, cross_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )


def test_a_heat_map_of_a_cached_network_counts_its_layers_alike():
    """FirstBlockCache leaves later layers out of some steps: the first must not weigh more for that."""
    pipe, options = PIPELINES["wan"].build()
    pipe.transformer.enable_cache(first_block())
    with cvg.capture(pipe, words=WORDS) as captured:
        run(pipe, options, num_inference_steps=5)
    by_layer = {}
    for record in captured.records:
        if record.branch == "cond":
            by_layer.setdefault(record.layer, []).append(record.maps[0])
    counts = sorted(len(maps) for maps in by_layer.values())
    assert counts[-1] == 5 and counts[0] < 5  # the cache did its work
    want = torch.stack([torch.stack(maps).mean(0) for maps in by_layer.values()]).mean(0)
    torch.testing.assert_close(heat(captured), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [first_block, pyramid], ids=lambda config: config.__name__)
@pytest.mark.parametrize("method", [VICO, Push(), cvg.VSTAR(sigma=1.0)], ids=lambda method: type(method).__name__)
def test_methods_on_a_cached_network(method, config):
    """Those that call it in between are refused with the reason; others leave the cache alone."""
    pipe, options = PIPELINES["wan"].build()
    pipe.transformer.enable_cache(config())
    if method is VICO:
        with pytest.raises(cvg.ArgumentError, match=r"cache enabled.*call disable_cache\(\) first"):
            method.attach(pipe)
        pipe.transformer.disable_cache()
    with method.attach(pipe) as made:
        run(pipe, options)
    assert made.guided_steps


def test_a_cache_that_is_enabled_in_the_block_is_refused_when_it_runs():
    pipe, options = PIPELINES["wan"].build()
    with pytest.raises(cvg.ArgumentError, match="cache enabled"), VICO.attach(pipe):
        pipe.transformer.enable_cache(first_block())
        run(pipe, options)
