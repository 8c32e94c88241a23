"""Quantised weights: GGUF, torchao and bitsandbytes on the CPU, as far as each is installed and can run there."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch  # noqa: E402
from torch import nn  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from tests.coverage.oracle import watched  # noqa: E402
from tests.pipeline.field import WORDS  # noqa: E402
from tests.pipelines import PIPELINES, run  # noqa: E402
from tests.pipelines.wan import TRANSFORMER, parts  # noqa: E402
from tests.roundings import assert_equal_but_for_roundings, moves  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def built():
    """Wan with 32 channels, the block of most formats."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide = {**TRANSFORMER, "attention_head_dim": 16}
        transformer = diffusers.WanTransformer3DModel(**wide).eval()
        pipe = diffusers.WanPipeline(transformer_2=None, **parts(transformer))
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**PIPELINES["wan"].build()[1], "num_inference_steps": 2}


def linears(pipe):
    return [
        (pipe.transformer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    ]


def gguf_q8(pipe):
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    for parent, name, module in linears(pipe):
        bits = torch.from_numpy(gguf.quants.quantize(module.weight.detach().numpy(), kind))
        shape = module.in_features, module.out_features, module.bias is not None
        made = GGUFLinear(*shape, compute_dtype=torch.float32)
        made.weight, made.bias = GGUFParameter(bits, quant_type=kind), module.bias
        setattr(parent, name, made)


def _torchao(pipe, config):
    pytest.importorskip("torchao")
    from torchao import quantization

    quantization.quantize_(pipe.transformer.blocks, getattr(quantization, config)())


def torchao_int8(pipe):
    _torchao(pipe, "Int8WeightOnlyConfig")


def torchao_float8(pipe):
    _torchao(pipe, "Float8WeightOnlyConfig")


def torchao_dynamic(pipe):
    _torchao(pipe, "Int8DynamicActivationInt8WeightConfig")


def _bitsandbytes(pipe, layer, weight, **options):
    for parent, name, module in linears(pipe):
        made = layer(module.in_features, module.out_features, bias=module.bias is not None)
        made.weight = weight(module.weight.data.clone(), requires_grad=False, **options)
        made.bias = module.bias
        setattr(parent, name, made.to("cpu"))


def bitsandbytes_8(pipe):
    kinds = pytest.importorskip("bitsandbytes").nn

    def layer(*shape, **how):
        return kinds.Linear8bitLt(*shape, has_fp16_weights=False, **how)

    _bitsandbytes(pipe, layer, kinds.Int8Params, has_fp16_weights=False)


def bitsandbytes_4(pipe):
    kinds = pytest.importorskip("bitsandbytes").nn
    _bitsandbytes(pipe, kinds.Linear4bit, kinds.Params4bit, quant_type="nf4")


#: Those that round the weights alone. `bitsandbytes_8` rounds what the layers are given too, where that is large;
#: `torchao_dynamic` always, so that the last bit of an input may be a step of 8 bits, and no two runs can be compared.
WEIGHTS = [gguf_q8, torchao_int8, torchao_float8, bitsandbytes_4]


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("quantise", [*WEIGHTS, bitsandbytes_8], ids=lambda one: one.__name__)
def test_capture_and_swap(quantise):
    """The video is the quantised model's own, and the maps are those of the queries and keys that it makes."""
    pipe, options = built()
    quantise(pipe)
    with watched([pipe.transformer]) as watch:
        stock = run(pipe, options)
    with cvg.capture(pipe, words=WORDS) as captured:
        torch.testing.assert_close(run(pipe, options), stock, rtol=1e-4, atol=1e-5)
    seen = [one for one in watch.seen if one.layer.endswith("attn2")]
    assert len(seen) == len(captured.records) == 8  # 2 layers, 2 steps, 2 branches
    ids = [list(span.ids) for span in captured.tokens[0]]
    for one, record in zip(seen, captured.records, strict=True):
        want = one.maps(ids).float().view(record.maps.shape)
        torch.testing.assert_close(record.maps, want, rtol=1e-4, atol=1e-6)
    with cvg.processors(pipe):
        torch.testing.assert_close(run(pipe, options), stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantise", WEIGHTS, ids=lambda one: one.__name__)
def test_guidance_is_that_of_the_rounded_weights(quantise):
    """Losses, gradients and video are those of a plain model that has the weights written out, but for roundings."""
    rounded, options = built()
    quantise(rounded)
    plain, _ = built()
    quantise(plain)
    write_out(plain)
    moved = moves(lambda: guided(plain, options), [plain.transformer])
    assert_equal_but_for_roundings(guided(rounded, options), guided(plain, options), moved)


def write_out(pipe):
    """Puts plain layers in the place of quantised ones."""
    for parent, name, module in linears(pipe):
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        with torch.no_grad():
            zero = module(torch.zeros(1, module.in_features))
            plain.weight.copy_((module(torch.eye(module.in_features)) - zero).T)
            plain.bias.copy_(zero[0])
        setattr(parent, name, plain)


def guided(pipe, options):
    """The video, and the loss and the gradient's size of every update."""
    with cvg.Vico(words=WORDS, stop=1.0, iterations=1).attach(pipe) as made:
        video = run(pipe, options)
    assert made.guided_steps == 2
    return [video, *(entry[key] for key in ("loss", "gradient_norm") for entry in made.history)]


def test_layers_without_a_gradient_are_told():
    pipe, options = built()
    torchao_dynamic(pipe)
    message = "no gradient to the latents: .* quantise the weights alone"
    with pytest.raises(cvg.ArgumentError, match=message), cvg.Vico(words=WORDS).attach(pipe):
        run(pipe, options)
