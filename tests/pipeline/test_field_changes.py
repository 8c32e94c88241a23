"""What people set on a pipeline while something is attached to it:
it acts at once, and stays when the block is left.
"""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch  # noqa: E402
from diffusers.models.attention_processor import AttnProcessor2_0  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from tests.pipeline.field import WORDS, Push, tree  # noqa: E402
from tests.pipelines import PIPELINES, denoisers, run  # noqa: E402
from tests.pipelines.unets import ip_adapter_weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class House(AttnProcessor2_0):
    """A processor of somebody's own."""


def fuse(pipe):
    for denoiser in denoisers(pipe):
        denoiser.fuse_qkv_projections()


def unfuse(pipe):
    for denoiser in denoisers(pipe):
        denoiser.unfuse_qkv_projections()


def new_processors(pipe):
    pipe.unet.set_attn_processor(House())


def load_lora(pipe):
    pytest.importorskip("peft")
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        denoisers(pipe)[0].add_adapter(config)


def fuse_lora(pipe):
    load_lora(pipe)
    denoisers(pipe)[0].fuse_lora()


def unload_lora(pipe):
    load_lora(pipe)
    denoisers(pipe)[0].delete_adapters("default")


def load_ip_adapter(pipe):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])


def unload_ip_adapter(pipe):
    load_ip_adapter(pipe)
    pipe.unload_ip_adapter()


def other_network(pipe):
    """`pipe.unet = other`."""
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = type(getattr(pipe, name)).from_config(getattr(pipe, name).config)
    setattr(pipe, name, made.eval())


def half(pipe):
    pipe.to(torch.bfloat16)


def free_u(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def checkpointing(pipe):
    denoisers(pipe)[0].enable_gradient_checkpointing()


CHANGES = {
    "animatediff": [
        fuse,
        new_processors,
        load_lora,
        fuse_lora,
        unload_lora,
        load_ip_adapter,
        other_network,
        unload_ip_adapter,
        half,
        free_u,
        checkpointing,
    ],
    "wan": [fuse, load_lora, fuse_lora, other_network, half],
    "cogvideox": [fuse, other_network],
}
CASES = [(name, change) for name, changes in CHANGES.items() for change in changes]


def call(pipe, options, change):
    if change is load_ip_adapter:
        image = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1))
        options = {**options, "ip_adapter_image_embeds": [image]}
    return run(pipe, options)


def heat(captured):
    return torch.stack([captured.heat_map(word) for word in WORDS])


@pytest.mark.parametrize(("name", "change"), CASES, ids=[f"{name}-{change.__name__}" for name, change in CASES])
@pytest.mark.drawn(7)
def test_a_change_in_the_block_is_one_before_it(name, change):
    """The same video, maps and guided steps, whether it was made before attaching, after,
    or in the middle of a run.
    """
    pipe, options = PIPELINES[name].build()
    change(pipe)
    after = {key: type(p).__name__ for key, p in denoisers(pipe)[0].attn_processors.items()}
    stock = call(pipe, options, change)
    with Push(stop=0.5).attach(pipe) as clean, cvg.capture(pipe, words=WORDS) as whole:
        want = call(pipe, options, change)

    pipe, options = PIPELINES[name].build()
    with Push(stop=0.5).attach(pipe) as made, cvg.capture(pipe, words=WORDS) as captured:
        run(pipe, options)
        change(pipe)
        got = call(pipe, options, change)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert made.guided == [*clean.guided, *((1, step) for _, step in clean.guided)]
    torch.testing.assert_close(heat(captured), heat(whole), rtol=1e-4, atol=1e-6)
    assert {key: type(p).__name__ for key, p in denoisers(pipe)[0].attn_processors.items()} == after
    assert not [key for module in denoisers(pipe)[0].modules() for key in vars(module) if "cvg" in key]
    torch.testing.assert_close(call(pipe, options, change), stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [fuse, new_processors], ids=lambda change: change.__name__)
def test_processors_that_change_in_the_middle_of_a_run(change):
    """In a callback: what comes after is seen as well, and the new processors stay; the swap says what it has lost."""
    pipe, options = PIPELINES["animatediff"].build()
    kinds = []

    def now(pipe, step, timestep, tensors):
        if step == 0:
            change(pipe)
            kinds.extend(type(p) for p in pipe.unet.attn_processors.values())
        return {}

    lost = pytest.warns(cvg.GuidanceWarning, match="14 of 21 swapped layers were given other proc")
    with cvg.capture(pipe, words=WORDS) as captured, lost, cvg.processors(pipe):
        run(pipe, options, callback_on_step_end=now)
    layers = {record.layer for record in captured.records}
    assert len(captured.records) == 3 * 2 * len(layers)
    assert [type(p) for p in pipe.unet.attn_processors.values()] == kinds


def test_a_fused_network_is_unfused_in_the_block():
    pipe, options = PIPELINES["animatediff"].build()
    before = tree(pipe)
    with cvg.capture(pipe, words=WORDS) as captured, cvg.processors(pipe):
        fuse(pipe)
        run(pipe, options)
        unfuse(pipe)
        run(pipe, options)
    assert len(captured.records) == 2 * 3 * 2 * len({record.layer for record in captured.records})
    after = tree(pipe)
    networks = {key for key in before if isinstance(key, tuple)}
    assert all(before[key][0] is after[key][0] for key in networks)
    assert before["attributes"] == after["attributes"] and before["classes"] == after["classes"]


def test_a_processor_that_cannot_be_captured_is_named():
    """Diffusers' "default" ones compute attention by hand; what was set stays."""
    pipe, options = PIPELINES["animatediff"].build()
    with (
        pytest.raises(cvg.ArgumentError, match="AttnProcessor does not call scaled_dot_product"),
        cvg.capture(pipe, words=["cat"]),
    ):
        pipe.unet.set_default_attn_processor()
        run(pipe, options)
    assert {type(p).__name__ for p in pipe.unet.attn_processors.values()} == {"AttnProcessor"}
