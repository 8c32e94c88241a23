"""Taps on attention layers: who is asked, whose processor it stays, and what diffusers sees of it meanwhile."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass, field

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.models.attention_dispatch import AttentionBackendName  # noqa: E402
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.pipeline.layers import Layer, attention_layers  # noqa: E402
from cvg_kernels.pipeline.taps import Tap, add_tap, keep_taps, remove_tap, tapped  # noqa: E402
from tests.offline_pipelines import run, wan  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(eq=False)
class Asked(Tap):
    """Notes which layers ask it, in a list that several may share."""

    name: str = ""
    log: list[tuple[str, str]] = field(default_factory=list)
    awake: bool = True
    computes: bool = False

    def active(self) -> bool:
        return self.awake

    def maps(self, attention):
        self.log.append((self.name, attention.layer.name))


class Other(AttnProcessor2_0):
    """Another processor, as a user may set one; twice the output tells it."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return 2 * super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


def layer_of(name: str = "attn", processor=None) -> Layer:
    made = Attention(8, cross_attention_dim=6, heads=2, dim_head=4).eval()
    if processor is not None:
        made.set_processor(processor)
    return Layer(name, made, "cross")


@pytest.fixture
def layer() -> Layer:
    return layer_of()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 5, 8), torch.randn(2, 3, 6)


@torch.no_grad()
def call(layer: Layer, inputs):
    return layer.module(*inputs)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_taps_leave_in_any_order(order, layer, inputs):
    """Those that are left are asked, in the order in which they came; the last leaves the very processor."""
    stock, wanted, log = layer.module.processor, call(layer, inputs), []
    taps = [Asked(name=f"tap {number}", log=log) for number in range(3)]
    for tap in taps:
        add_tap(layer, tap)
    there = list(range(3))
    for leaving in order:
        assert layer.module.processor is not stock
        log.clear()
        torch.testing.assert_close(call(layer, inputs), wanted)
        assert log == [(f"tap {number}", "attn") for number in there]
        remove_tap(layer, taps[leaving])
        remove_tap(layer, taps[leaving])  # does no harm
        there.remove(leaving)
    assert layer.module.processor is stock and not any("_cvg" in name for name in vars(layer.module))
    log.clear()
    assert torch.equal(call(layer, inputs), wanted) and not log


def test_taps_of_a_block_leave_after_an_exception(layer, inputs):
    stock, tap = layer.module.processor, Asked()
    with pytest.raises(KeyboardInterrupt), tapped([(layer, tap), (layer, Asked())]):
        call(layer, inputs)
        raise KeyboardInterrupt
    assert tap.log and layer.module.processor is stock
    failing = Layer("function", layer_of().module, "cross")
    failing.module.processor = len  # which no tap can be put on
    with pytest.raises(cvg.ArgumentError, match="a processor must be an object of a class"):
        tapped([(layer, tap), (failing, tap)]).__enter__()
    assert layer.module.processor is stock and failing.module.processor is len


def test_a_tap_that_sleeps_is_not_asked(layer, inputs):
    wanted, asleep, awake = call(layer, inputs), Asked(awake=False), Asked()
    with tapped([(layer, asleep)]):
        assert torch.equal(call(layer, inputs), wanted)
        with tapped([(layer, awake)]):
            call(layer, inputs)
    assert len(awake.log) == 1 and not asleep.log


def test_a_tap_that_computes_takes_our_kernels(layer, inputs):
    wanted = call(layer, inputs)
    with tapped([(layer, Asked())]), cvg.trace_backends() as ran:
        assert torch.equal(call(layer, inputs), wanted)
    assert not ran
    with tapped([(layer, Asked(computes=True))]), cvg.trace_backends() as ran:
        torch.testing.assert_close(call(layer, inputs), wanted)
    assert [operation for operation, _ in ran] == ["attention"]


def test_a_processor_that_is_set_meanwhile_is_tapped_and_stays(layer, inputs):
    first, tap, other = layer.module.processor, Asked(), Other()
    plain = call(layer, inputs)
    with tapped([(layer, tap)]):
        layer.module.set_processor(other)
        torch.testing.assert_close(call(layer, inputs), 2 * plain)
        assert not tap.log  # nobody has looked yet
        keep_taps(layer)
        torch.testing.assert_close(call(layer, inputs), 2 * plain)
        assert len(tap.log) == 1 and isinstance(layer.module.processor, Other)
        ours = layer.module.processor
        keep_taps(layer)
        assert layer.module.processor is ours
    assert layer.module.processor is other
    with tapped([(layer, tap)]):
        layer.module.set_processor(first)  # without a look before the end
    assert layer.module.processor is first
    keep_taps(layer)  # without taps it does nothing
    assert layer.module.processor is first


@pytest.mark.parametrize("looked", [False, True], ids=["", "looked at between"])
def test_a_processor_that_is_put_aside_and_back_is_the_stock_one_in_the_end(looked, layer, inputs):
    """As `fuse_qkv_projections` and LoRA do: they note the processors, set others, and set the noted ones again."""
    stock, tap = layer.module.processor, Asked()
    with tapped([(layer, tap)]):
        noted = layer.module.processor
        layer.module.set_processor(Other())
        if looked:
            keep_taps(layer)
        layer.module.set_processor(noted)
        keep_taps(layer)
        call(layer, inputs)
        assert len(tap.log) == 1
    assert layer.module.processor is stock


def test_one_processor_of_two_layers(inputs):
    """Each layer asks its own taps, and one without taps none, though all share one object."""
    shared = AttnProcessor2_0()
    one, two, bare = (layer_of(name, shared) for name in ("one", "two", "bare"))
    wanted = [call(layer, inputs) for layer in (one, two, bare)]
    log = []
    taps = [(one, Asked("first", log)), (two, Asked("second", log))]
    with tapped(taps):
        found = [call(layer, inputs) for layer in (one, two, bare)]
        assert log == [("first", "one"), ("second", "two")]
        remove_tap(*taps[0])
        log.clear()
        for layer in (one, two, bare):
            call(layer, inputs)
        assert log == [("second", "two")]
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert all(layer.module.processor is shared for layer in (one, two, bare))


def test_to_diffusers_it_is_the_processor_that_it_was(layer, inputs):
    stock = layer.module.processor
    with tapped([(layer, Asked())]):
        seen = layer.module.processor
        assert seen.__class__ is AttnProcessor2_0 and isinstance(seen, AttnProcessor2_0)
        assert type(seen).__name__ == "AttnProcessor2_0"
        assert inspect.signature(seen.__call__) == inspect.signature(stock.__call__)
        seen.mark = 1  # what is set on it is set on the processor
    assert stock.mark == 1


def test_a_processor_made_of_the_class_is_a_stock_one(inputs):
    """As diffusers makes one of what it finds; here of a layer with a tap for a layer without, and for the same."""
    layer, bare, tap = layer_of("tapped", Other()), layer_of("bare"), Asked()
    with tapped([(layer, tap)]):
        made = layer.module.processor.__class__()
        assert type(made) is Other
        bare.module.set_processor(made)
        call(bare, inputs)
        assert not tap.log
        layer.module.set_processor(made)
        keep_taps(layer)
        call(layer, inputs)
        assert len(tap.log) == 1
    assert layer.module.processor is made and bare.module.processor is made


def test_a_processor_with_parameters_keeps_them(inputs):
    """IP-Adapter's processors are modules: their parameters are saved, found, cast and changed as ever."""
    processor = IPAdapterAttnProcessor2_0(8, cross_attention_dim=6, num_tokens=(4,))
    layer = layer_of("ip", processor)
    image = [torch.randn(2, 1, 4, 6)]
    wanted = call(layer, (inputs[0], (inputs[1], image)))
    before = {name: value.clone() for name, value in layer.module.state_dict().items()}
    names = [name for name, _ in layer.module.named_parameters()]
    assert any("to_k_ip" in name for name in names)
    tap = Asked()
    with tapped([(layer, tap)]):
        assert layer.module.processor.__class__ is IPAdapterAttnProcessor2_0
        assert isinstance(layer.module.processor, IPAdapterAttnProcessor2_0)
        assert isinstance(layer.module.processor, torch.nn.Module)
        assert [name for name, _ in layer.module.named_parameters()] == names
        assert layer.module.state_dict().keys() == before.keys()
        assert torch.equal(call(layer, (inputs[0], (inputs[1], image))), wanted)
        assert len(tap.log) == 2  # to the text, and to the image
        layer.module.load_state_dict({name: 2 * value for name, value in before.items()})
        layer.module.processor.scale = [0.5]  # as set_ip_adapter_scale does
        layer.module.double()
    assert layer.module.processor is processor and processor.scale == [0.5]
    after = layer.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], 2 * value.double()) for name, value in before.items())


def test_a_processor_with_parameters_may_come_and_go_meanwhile(layer):
    """As loading and unloading an IP-Adapter does."""
    stock, tap = layer.module.processor, Asked()
    names = list(layer.module.state_dict())
    with tapped([(layer, tap)]):
        layer.module.set_processor(IPAdapterAttnProcessor2_0(8, cross_attention_dim=6))
        keep_taps(layer)
        assert len(layer.module.state_dict()) == len(names) + 2
        layer.module.set_processor(stock)
        keep_taps(layer)
        assert list(layer.module.state_dict()) == names
    assert layer.module.processor is stock and list(layer.module.state_dict()) == names


def test_a_backend_of_attention_that_is_set_meanwhile_stays():
    """While we take its place PyTorch's own is called; before and afterwards the one that was set, also after an
    error.
    """
    pipe, options = wan()
    layers = attention_layers(pipe.transformer)
    before = [layer.module.processor for layer in layers]
    stock = run(pipe, options)

    class Look(Asked):
        def maps(self, attention):
            self.log.append(attention.layer.module.processor._attention_backend)

    tap = Look()
    try:
        with tapped([(layer, tap) for layer in layers]):
            pipe.transformer.set_attention_backend("_native_math")
            torch.testing.assert_close(run(pipe, options), stock, rtol=1e-4, atol=1e-4)
            assert set(tap.log) == {AttentionBackendName.NATIVE}
            tap.maps = lambda attention: 1 / 0
            with pytest.raises(ZeroDivisionError):
                run(pipe, options)
            chosen = {layer.module.processor._attention_backend for layer in layers}
            assert chosen == {AttentionBackendName._NATIVE_MATH}
        after = [layer.module.processor for layer in layers]
        assert all(one is other for one, other in zip(after, before, strict=True))
        assert {one._attention_backend for one in after} == {AttentionBackendName._NATIVE_MATH}
    finally:
        pipe.transformer.set_attention_backend("native")  # is one for the process


def test_a_processor_without_the_function_is_named(inputs):
    layer, asleep = layer_of("down.attn2", AttnProcessor()), Asked(awake=False)
    wanted = call(layer, inputs)
    with tapped([(layer, asleep)]):
        assert torch.equal(call(layer, inputs), wanted)
    message = "down.attn2 cannot be captured: its processor AttnProcessor does not call scaled_dot"
    with pytest.raises(cvg.ArgumentError, match=message), tapped([(layer, Asked())]):
        call(layer, inputs)


def test_two_bands_are_refused(layer, inputs):
    class Band(Tap):
        def band(self, attention):
            return {"sigma": 1.0}

    with (
        pytest.raises(cvg.ArgumentError, match="attn is regularised by two methods at once"),
        tapped([(layer, Band()), (layer, Band())]),
    ):
        call(layer, inputs)


@pytest.mark.parametrize("option", [{"dropout_p": 0.5}, {"is_causal": True}])
def test_attention_of_other_kinds_is_refused_where_something_is_wanted(option, inputs):
    """A layer is left alone as long as nobody wants its maps."""

    class Kind:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            heads = hidden_states.unflatten(-1, (2, 4)).transpose(1, 2)
            out = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, **option)
            return out.transpose(1, 2).flatten(2)

    layer, tap = layer_of("odd", Kind()), Asked()
    with tapped([(layer, tap)]):
        assert call(layer, inputs).shape == inputs[0].shape and tap.log
    ((name, value),) = option.items()
    message = f"cannot be captured; got .*{name}={value}"
    with pytest.raises(cvg.ArgumentError, match=message), tapped([(layer, Asked(computes=True))]):
        call(layer, inputs)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_grouped_heads(backend, inputs):
    """Four heads of the query for two of the keys: the first two of the four read the first."""

    class Grouped:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            query = hidden_states.unflatten(-1, (4, 2)).transpose(1, 2)
            keys = hidden_states[..., :4].unflatten(-1, (2, 2)).transpose(1, 2)
            sdpa = torch.nn.functional.scaled_dot_product_attention
            return sdpa(query, keys, keys, enable_gqa=True).transpose(1, 2).flatten(2)

    seen = []

    class Looking(Asked):
        def maps(self, attention):
            seen.append(attention.query @ attention.key.mT)

    layer = layer_of("grouped", Grouped())
    wanted = call(layer, inputs)
    tap = Looking(computes=True)
    tap.backend = backend
    with tapped([(layer, tap)]):
        torch.testing.assert_close(call(layer, inputs), wanted)
    query, keys = inputs[0].unflatten(-1, (4, 2)), inputs[0][..., :4].unflatten(-1, (2, 2))
    products = torch.einsum("bnhd,bmhd->bhnm", query, keys[:, :, [0, 0, 1, 1]])
    torch.testing.assert_close(seen[0], products)
