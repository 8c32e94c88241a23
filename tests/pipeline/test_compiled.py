"""Compiled denoisers with something attached: one graph, the maps of eager, none compiled twice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch  # noqa: E402
from diffusers.models.attention_processor import Attention, AttnProcessor  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.pipeline.layers import Layer, attention_layers  # noqa: E402
from cvg_kernels.pipeline.taps import Tap, tapped  # noqa: E402
from tests.pipeline.field import WORDS, tree  # noqa: E402
from tests.pipelines import PIPELINES, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")

VICO = cvg.Vico(words=WORDS, stop=0.5, iterations=1)
#: Maps are the operation's own, of the same tensors, whichever way they leave; a compiler may fuse what comes before.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@dataclass
class Graphs:
    """A backend of `torch.compile` that runs graphs as they are and counts them."""

    made: list[torch.fx.GraphModule] = field(default_factory=list)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.made.append(graph)
        return graph.forward

    def new(self) -> int:
        """How many there are since it was asked last."""
        made = len(self.made)
        self.made.clear()
        return made


def in_place(pipe, part, **options):
    getattr(pipe, part).compile(**options)


def wrapped(pipe, part, **options):
    setattr(pipe, part, torch.compile(getattr(pipe, part), **options))


def blocks(pipe, part, **options):
    getattr(pipe, part).compile_repeated_blocks(**options)


def part_of(pipe) -> str:
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def settled():
    """Within it nothing may be compiled that was compiled before."""
    return torch._dynamo.config.patch(error_on_recompile=True)


def by_layer(captured) -> dict[tuple, torch.Tensor]:
    """The maps of the first run."""
    return {
        (record.step, record.layer, record.kind, record.branch): record.maps
        for record in captured.records
        if record.run == 0
    }


CASES = [
    ("wan", in_place, "compiled first"),
    ("wan", in_place, "attached first"),
    ("wan", wrapped, "compiled first"),
    ("wan", wrapped, "attached first"),
    ("wan", blocks, "compiled first"),
    ("wan", blocks, "attached first"),
    ("cogvideox", wrapped, "compiled first"),
    ("latte", in_place, "compiled first"),
    ("modelscope", wrapped, "attached first"),
    ("hunyuan_video", in_place, "compiled first"),
    ("ltx", blocks, "attached first"),
]


@pytest.mark.parametrize(
    ("name", "how", "when"), CASES, ids=[f"{case[0]}-{case[1].__name__}-{case[2]}" for case in CASES]
)
@pytest.mark.drawn(12, of="compiled networks")
def test_capture_is_part_of_one_graph(name, how, when, coverage_note):
    """`fullgraph=True`: a break would be an error. One graph more, and none for later steps, runs, words or
    attachments.
    """
    pipe, options = PIPELINES[name].build()
    options["num_inference_steps"] = 1
    temporal = name in ("latte", "modelscope")
    stock = run(pipe, options)
    with cvg.capture(pipe, words=WORDS, temporal=temporal) as eager:
        run(pipe, options)
    graphs, before = Graphs(), None
    compiled = {"backend": graphs, "fullgraph": True}
    if when == "compiled first":
        how(pipe, part_of(pipe), **compiled)
        run(pipe, options)
        assert graphs.new() == 1
        before = tree(pipe)
    with cvg.capture(pipe, words=WORDS, temporal=temporal) as captured:
        if when == "attached first":
            how(pipe, part_of(pipe), **compiled)
        torch.testing.assert_close(run(pipe, options), stock, rtol=1e-4, atol=1e-4)
        assert graphs.new() == 1
        with settled():
            run(pipe, options, num_inference_steps=10)
    if before is not None:
        with settled():
            torch.testing.assert_close(run(pipe, options), stock)
        assert tree(pipe) == before
    with settled(), cvg.capture(pipe, words=WORDS[::-1], temporal=temporal):
        run(pipe, options)
    assert graphs.new() == 0 and not counters["graph_break"]
    found, wanted = by_layer(captured), by_layer(eager)
    assert list(found) == list(wanted)  # in the order in which the layers ran
    torch.testing.assert_close(found, wanted, **CLOSE)
    coverage_note(name, "compile", "one graph")


@pytest.mark.drawn(12, of="compiled networks")
def test_a_network_that_breaks_by_itself_breaks_no_more(coverage_note):
    """AnimateDiff's sizes here need a resized upsampling, of which the stock forward writes to its log."""
    pipe, options = PIPELINES["animatediff"].build()
    options["num_inference_steps"] = 1
    with cvg.capture(pipe, words=WORDS) as eager:
        run(pipe, options)
    in_place(pipe, "unet", backend=Graphs())
    with cvg.capture(pipe, words=WORDS) as captured:
        run(pipe, options)
    reasons = counters["graph_break"]
    assert reasons and all(reason.startswith("logging.Logger") for reason in reasons), reasons
    torch.testing.assert_close(by_layer(captured), by_layer(eager), **CLOSE)
    coverage_note("animatediff", "compile", "broken where the stock network is")


@pytest.mark.drawn(12, of="compiled networks")
@pytest.mark.parametrize("how", [wrapped, blocks], ids=lambda how: how.__name__)
def test_guidance_runs_in_graphs(how):
    """Vico's gradient goes through the compiled denoiser:
    the same losses and video, nothing compiled at later steps.
    """
    pipe, options = PIPELINES["wan"].build()
    options["num_inference_steps"] = 2

    def guided(**changes):
        with VICO.attach(pipe) as made:
            frames = run(pipe, options, **changes)
        return frames, torch.stack([entry["loss"] for entry in made.history])

    want = guided()
    how(pipe, "transformer", backend=(graphs := Graphs()), fullgraph=True)
    run(pipe, options)
    assert graphs.new() == 1
    torch.testing.assert_close(guided(), want, **CLOSE)
    # Of the maps and their gradient; the first block alone has no maps between frames, through which a flow comes.
    assert graphs.new() == (2 if how is blocks else 1)
    with settled():
        guided(num_inference_steps=10)
        run(pipe, options)
    assert graphs.new() == 0 and not counters["graph_break"]


@pytest.mark.drawn(12, of="compiled networks")
@pytest.mark.parametrize(("how", "name"), [(wrapped, "wan"), (blocks, "wan"), (wrapped, "cogvideox")])
def test_temporal_maps_in_graphs(how, name):
    """Of attention that spans the video: those of the eager run, nothing compiled at later steps."""
    pipe, options = PIPELINES[name].build()

    def captured(**changes):
        with cvg.capture(pipe, temporal=True) as found:
            frames = run(pipe, options, **changes)
        return frames, torch.stack([record.maps for record in found.records])

    want = captured()
    how(pipe, "transformer", backend=(graphs := Graphs()), fullgraph=True)
    torch.testing.assert_close(captured(), want, **CLOSE)
    assert graphs.new() == 1
    with settled():
        captured(num_inference_steps=10)
    assert graphs.new() == 0 and not counters["graph_break"]


@pytest.mark.drawn(6)
@pytest.mark.parametrize("how", [wrapped, blocks], ids=lambda how: how.__name__)
def test_a_gradient_of_captured_maps(how):
    """To the latents, through maps that were captured in a loop of the user's own."""
    pipe, _ = PIPELINES["wan"].build()
    network = pipe.transformer.requires_grad_(False)
    latents = torch.randn(1, network.config.in_channels, 2, 4, 4)
    text = torch.randn(1, 8, network.config.text_dim)
    call = {"timestep": torch.tensor([500]), "encoder_hidden_states": text}

    def gradient():
        z = latents.clone().requires_grad_()
        with cvg.capture(pipe, words=WORDS, prompt=" ".join(WORDS), gradients=True) as captured:
            pipe.transformer(hidden_states=z, **call)
            loss = sum(record.maps.square().sum() for record in captured.records)
            (found,) = torch.autograd.grad(loss, z)
        return found

    want = gradient()
    assert want.any()
    how(pipe, "transformer", backend=(graphs := Graphs()), fullgraph=True)
    torch.testing.assert_close(gradient(), want, **CLOSE)
    assert graphs.new() == 1
    with settled():
        gradient()


@pytest.mark.drawn(12, of="compiled networks")
@pytest.mark.parametrize("how", [wrapped, blocks], ids=lambda how: how.__name__)
def test_the_swap_is_part_of_a_graph(how):
    """Also while something is captured, and gone with its end."""
    pipe, options = PIPELINES["wan"].build()
    options["num_inference_steps"] = 1
    stock = run(pipe, options)
    how(pipe, "transformer", backend=(graphs := Graphs()), fullgraph=True)
    run(pipe, options)
    assert graphs.new() == 1
    with cvg.processors(pipe, backend="native"):
        for _ in range(2):
            with cvg.trace_backends() as ran:
                torch.testing.assert_close(run(pipe, options), stock, rtol=1e-4, atol=1e-4)
            assert set(ran) == {("attention", "native")}
        assert graphs.new() == 1
        with cvg.capture(pipe, words=WORDS) as captured:
            run(pipe, options)
        assert captured.records and graphs.new() == 1
        with settled():
            run(pipe, options)
    with settled(), cvg.trace_backends() as ran:
        torch.testing.assert_close(run(pipe, options), stock)
    assert not ran and graphs.new() == 0


@pytest.mark.drawn(12, of="compiled networks")
def test_several_take_part_in_one_graph():
    """Two captures of other words and a method at once."""
    pipe, options = PIPELINES["wan"].build()
    options["num_inference_steps"] = 2

    def results():
        with ExitStack() as stack:
            made = stack.enter_context(VICO.attach(pipe))
            both = [stack.enter_context(cvg.capture(pipe, words=[word])) for word in WORDS]
            frames = run(pipe, options)
        losses = torch.stack([entry["loss"] for entry in made.history])
        return frames, losses, [by_layer(captured) for captured in both]

    want = results()
    wrapped(pipe, "transformer", backend=(graphs := Graphs()), fullgraph=True)
    torch.testing.assert_close(results(), want, **CLOSE)
    assert graphs.new()
    with settled():
        results()


@pytest.mark.drawn(8, of="long tests")
def test_what_a_graph_cannot_see_runs_uncompiled(caplog):
    """VSTAR's band depends on the step; what else is captured meanwhile is right, and afterwards all is compiled."""
    pipe, options = PIPELINES["wan"].build()
    options["num_inference_steps"] = 2
    method = cvg.VSTAR(sigma=1.0)

    def results():
        with method.attach(pipe), cvg.capture(pipe, words=WORDS) as captured:
            frames = run(pipe, options)
        return frames, by_layer(captured)

    want = results()
    in_place(pipe, "transformer", backend=(graphs := Graphs()), fullgraph=True)
    run(pipe, options)
    before = tree(pipe)
    graphs.new()
    with caplog.at_level(logging.WARNING, "cvg_kernels"):
        torch.testing.assert_close(results(), want, **CLOSE)
    assert "WanTransformer3DModel is compiled; while attached to, it runs uncompiled" in caplog.text
    assert graphs.new() == 0 and tree(pipe) == before
    with settled():
        run(pipe, options)


@pytest.mark.drawn(12, of="compiled networks")
def test_a_tap_that_cannot_be_foreseen_breaks_the_graph():
    """Outside of a pipeline's run too: it is asked at its call;
    with `fullgraph=True` the compiler's error names it.
    """
    pipe, _ = PIPELINES["wan"].build()
    network = pipe.transformer
    asked = []

    class Asked(Tap):
        def maps(self, place):
            asked.append(place.layer.name)

    call = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, 32),
    }
    layers = attention_layers(network)
    with torch.no_grad(), tapped([(layer, Asked()) for layer in layers]):
        want = network(**call)[0]
        names, asked = asked[:], []
        assert len(names) == len(layers)
        in_place(pipe, "transformer", backend="eager")
        torch.testing.assert_close(network(**call)[0], want)
        assert asked == names
        in_place(pipe, "transformer", backend="eager", fullgraph=True)
        torch._dynamo.reset()
        message = "a tap of the layer cannot be part of a graph"
        with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
            network(**call)


@pytest.mark.drawn(8, of="long tests")
def test_a_failed_run_leaves_the_compiled_network(monkeypatch):
    pipe, options = PIPELINES["wan"].build()
    options["num_inference_steps"] = 1
    wrapped(pipe, "transformer", backend=(graphs := Graphs()), fullgraph=True)
    stock = run(pipe, options)
    before = tree(pipe)
    graphs.new()
    with pytest.raises(ZeroDivisionError), cvg.capture(pipe, words=WORDS) as captured:
        monkeypatch.setattr(captured, "record", lambda *_: 1 / 0)
        run(pipe, options)
    assert tree(pipe) == before
    graphs.new()
    with settled():
        torch.testing.assert_close(run(pipe, options), stock)
    assert graphs.new() == 0


def test_a_processor_without_the_function_is_named():
    class Swapped(Tap):
        computes = foreseen = constant = True

    attention = Attention(8, cross_attention_dim=6, heads=2, dim_head=4, processor=AttnProcessor())
    attention.compile(backend="eager")
    given = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    with (
        torch.no_grad(),
        tapped([(Layer("down.attn2", attention, "cross"), Swapped())]),
        pytest.raises(cvg.ArgumentError, match=r"down\.attn2 .* does not call scaled_dot"),
    ):
        attention(*given)


@pytest.mark.drawn(12, of="compiled networks")
def test_maps_of_inductor(tmp_path, monkeypatch):
    """What people compile with: its kernels reorder sums, the maps stay those of eager to 1e-5."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    pipe, options = PIPELINES["wan"].build()
    options["num_inference_steps"] = 2
    with cvg.capture(pipe, words=WORDS) as eager:
        want = run(pipe, options)
    blocks(pipe, "transformer", fullgraph=True)
    with cvg.capture(pipe, words=WORDS) as captured:
        got = run(pipe, options)
    torch.testing.assert_close(by_layer(captured), by_layer(eager), **CLOSE)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert any(tmp_path.rglob("*.py"))  # it has written kernels
