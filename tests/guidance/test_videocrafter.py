"""VSTAR's band on a UNet built as VideoCrafter's:
on the right layers and steps, nothing else touched, all put back.
"""

from __future__ import annotations

from types import MethodType

import pytest
import torch

import cvg_kernels as cvg
from tests.lvdm import BasicTransformerBlock, CrossAttention, UNetModel

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = range(961, 0, -40)  # of a DDIM sampler with S=25
SIGMA = {8: 1.0, 4: 3.0}  # the columns of the two levels
LEVELS = {"init_attn": None, "input_blocks.0": 8, "input_blocks.1": 4, "output_blocks.0": 8}
BAND = cvg.VSTAR(sigma=SIGMA, strength=1.5)


@pytest.fixture
def unet() -> UNetModel:
    return UNetModel().eval()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 5, 6, 8), torch.randn(2, 7, 6)


@torch.no_grad()
def call(unet, inputs, timestep=STEPS[0]):
    latents, context = inputs
    return unet(latents, torch.full((latents.shape[0],), timestep), context=context, fps=8)


def attentions(unet):
    return {name: one for name, one in unet.named_modules() if isinstance(one, CrossAttention)}


def eager(attention, x, context=None, sigma=None, strength=0.0):
    """The definition, in float64."""
    x = x.double()
    context = x if context is None else context.double()
    q, k, v = (
        (y @ project.weight.double().T).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for y, project in ((x, attention.to_q), (context, attention.to_k), (context, attention.to_v))
    )
    logits = attention.scale * q @ k.mT
    if sigma is not None:
        at = torch.arange(x.shape[1], dtype=torch.float64)
        band = torch.exp(-((at[:, None] - at) ** 2) / (2 * sigma**2))
        logits = logits + strength * logits.amax(-1, keepdim=True) * band
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(-2)
    return out @ attention.to_out[0].weight.double().T + attention.to_out[0].bias.double()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("temporal_context", [False, True])
def test_every_layer_computes_the_definition(temporal_context, backend, inputs):
    """Temporal self-attention has its level's band; the first layer, attention to text and within frames have none."""
    unet = UNetModel(temporal_context=temporal_context).eval()
    seen = {}
    for name, attention in attentions(unet).items():
        attention.scale *= 1.3  # not torch's default
        attention.register_forward_hook(
            lambda module, args, kwargs, out, name=name: seen.update({name: (args, kwargs, out)}), with_kwargs=True
        )
    settings = cvg.VSTAR(sigma=SIGMA, strength=1.5, backend=backend)
    with settings.attach_videocrafter(unet), cvg.trace_backends() as ran:
        call(unet, inputs)
    assert ran == [("temporal_attention", backend)] * (3 if temporal_context else 6)
    assert len(seen) == 14
    for name, ((x,), kwargs, out) in seen.items():
        attention = unet.get_submodule(name)
        level = next(columns for place, columns in LEVELS.items() if name.startswith(place))
        frames_attend = x.shape[1] == 5 and kwargs["context"] is None
        sigma = SIGMA[level] if frames_attend and level else None
        wanted = eager(attention, x, kwargs["context"], sigma, 1.5)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.drawn(8, of="long tests")
def test_first_steps_have_the_band_and_the_others_are_stock(unet, inputs):
    """The released 14 of 25 steps; the rest to the last bit, as often as the sampler runs."""
    stock = [call(unet, inputs, step) for step in STEPS]
    with BAND.attach_videocrafter(unet):
        for _ in range(2):
            same = [torch.equal(call(unet, inputs, t), s) for t, s in zip(STEPS, stock, strict=True)]
            assert same == [False] * 14 + [True] * 11
    released = []
    for sigma in ("auto", {8: 1.0, 4: 8.0}):
        with cvg.VSTAR(sigma=sigma).attach_videocrafter(unet):
            released.append(call(unet, inputs))
    assert torch.equal(*released) and not torch.equal(released[0], stock[0])
    with cvg.VSTAR(sigma=None).attach_videocrafter(unet):
        assert torch.equal(call(unet, inputs), stock[0])
    with cvg.VSTAR(sigma={16: 1.0}).attach_videocrafter(unet):  # a width that no layer has
        assert torch.equal(call(unet, inputs), stock[0])
    with BAND.attach_videocrafter(unet, train_steps=2000):
        same = [torch.equal(call(unet, inputs, STEPS[i]), stock[i]) for i in (2, 3)]
        assert same == [False, True]  # 881 and 841, on either side of 0.44 · 2000


def test_everything_is_put_back(unet, inputs):
    own = unet.input_blocks[0][1].transformer_blocks[0].attn1
    calls = []

    def efficient_forward(self, x, context=None, mask=None):  # as set where xformers is installed
        calls.append(x.shape)
        return CrossAttention.forward(self, x, context, mask)

    own.forward = MethodType(efficient_forward, own)
    stock, keys = call(unet, inputs), list(unet.state_dict())
    before = {name: dict(vars(module)) for name, module in unet.named_modules()}
    with pytest.raises(ZeroDivisionError), BAND.attach_videocrafter(unet):
        assert list(unet.state_dict()) == keys
        calls.clear()
        assert not torch.equal(call(unet, inputs), stock) and not calls
        call(unet, inputs, 1)
        assert calls == [(2 * 6 * 8, 5, 8)]
        1 / 0  # noqa: B018
    for name, module in unet.named_modules():
        assert vars(module) == before[name] and not module._forward_pre_hooks
    assert torch.equal(call(unet, inputs), stock)


def test_a_network_that_tells_its_layers_the_step(unet, inputs, monkeypatch):
    """VSTAR's own UNet hands `time_index` to its attention: what runs as ever is given it, the band needs none."""
    with BAND.attach_videocrafter(unet):
        want = [call(unet, inputs, step) for step in (STEPS[0], STEPS[-1])]
    told = []

    class Told(CrossAttention):
        def forward(self, x, context=None, mask=None, time_index=None, place=None):
            told.append((time_index, place))
            return super().forward(x, context, mask)

    def telling(block, x, context, mask):
        more = {"time_index": 3, "place": "down"}
        x = block.attn1(block.norm1(x), context=None, mask=mask, **more) + x
        x = block.attn2(block.norm2(x), context=context, mask=mask, **more) + x
        return block.ff(block.norm3(x)) + x

    for attention in attentions(unet).values():
        attention.__class__ = Told
    monkeypatch.setattr(BasicTransformerBlock, "_forward", telling)
    for step, wanted in zip((STEPS[0], STEPS[-1]), want, strict=True):
        told.clear()
        with BAND.attach_videocrafter(unet):
            torch.testing.assert_close(call(unet, inputs, step), wanted)
        assert told and set(told) == {(3, "down")}


def test_one_within_another(unet, inputs):
    """The inner one counts, and leaving it leaves the outer one."""
    stock = call(unet, inputs)
    weaker = cvg.VSTAR(sigma=SIGMA, strength=0.5)
    with weaker.attach_videocrafter(unet):
        alone = call(unet, inputs)
    with BAND.attach_videocrafter(unet):
        outer = call(unet, inputs)
        with weaker.attach_videocrafter(unet):
            assert torch.equal(call(unet, inputs), alone)
        assert torch.equal(call(unet, inputs), outer)
    assert not torch.equal(outer, alone) and not torch.equal(outer, stock)


@pytest.mark.drawn(12, of="compiled networks")
def test_a_compiled_network_runs_uncompiled(unet, inputs, caplog):
    compiled = []

    def backend(graph, inputs):  # what torch.compile hands the traced code to
        compiled.append(graph)
        return graph.forward

    stock = call(unet, inputs)
    with BAND.attach_videocrafter(unet):
        banded = call(unet, inputs)
    assert not caplog.text
    wrapped = torch.compile(unet, backend=backend)
    with BAND.attach_videocrafter(wrapped):
        torch.testing.assert_close(call(wrapped, inputs), banded)
    assert "UNetModel is compiled; while attached to, it runs uncompiled" in caplog.text
    assert not compiled
    torch.testing.assert_close(call(wrapped, inputs), stock, rtol=1e-4, atol=1e-4)
    assert compiled


def test_gradient_through_checkpointed_blocks(unet, inputs):
    """Their layers run once more in the backward pass, when the call is over, and have its band."""
    latents, context = inputs
    time, gradients = torch.full((2,), STEPS[0]), []
    for checkpointed in (False, True):
        for module in unet.modules():
            if hasattr(module, "checkpoint"):
                module.checkpoint = checkpointed
        z = latents.clone().requires_grad_()
        with BAND.attach_videocrafter(unet):
            gradients += torch.autograd.grad(unet(z, time, context).square().sum(), z)
    torch.testing.assert_close(*gradients)
    z = latents.clone().requires_grad_()
    stock = torch.autograd.grad(unet(z, time, context).square().sum(), z)[0]
    assert not torch.allclose(gradients[0], stock, rtol=1e-3, atol=1e-3)


def test_errors_name_the_argument(unet, inputs):
    with pytest.raises(cvg.ArgumentError, match="unet must have attention modules .* got Linear"):
        BAND.attach_videocrafter(torch.nn.Linear(2, 2))
    with pytest.raises(cvg.ArgumentError, match="prompts and trained_frames need a diffusers"):
        cvg.VSTAR(prompts=["a", "b"]).attach_videocrafter(unet)
    model = torch.nn.ModuleDict({"diffusion_model": unet})
    with (
        pytest.raises(cvg.ArgumentError, match="the module that the sampler calls, got ModuleDict"),
        BAND.attach_videocrafter(model),
    ):
        call(unet, inputs)
    temporal = unet.output_blocks[0][2]
    temporal.causal_attention = True
    with pytest.raises(cvg.ArgumentError, match="with a mask is not supported"), BAND.attach_videocrafter(unet):
        call(unet, inputs)
    with BAND.attach_videocrafter(unet):
        call(unet, inputs, 1)  # without the band it is
    temporal.transformer_blocks[0].attn1.relative_position = True
    with pytest.raises(cvg.ArgumentError, match="without relative positions"):
        BAND.attach_videocrafter(unet)
