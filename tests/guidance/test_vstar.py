"""VSTAR on tiny pipelines: the band on the layers and steps it is meant for, a text for every frame, all put back."""

from __future__ import annotations

import http.server
import json
import threading

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance import diagonal_roughness, diagonality, synopsis  # noqa: E402
from cvg_kernels.guidance.vstar import frame_positions  # noqa: E402
from cvg_kernels.pipeline.layers import attention_layers  # noqa: E402
from cvg_kernels.pipeline.models import denoisers_of  # noqa: E402
from tests.offline_pipelines import BUILDERS, PROMPT, latte, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["animatediff", "modelscope", "latte"]  # those with temporal layers


def temporal_maps(pipe, options):
    """Frames, and the temporal maps by layer and step."""
    with cvg.capture(pipe, temporal=True) as captured:
        frames = run(pipe, options)
    return frames, captured


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", NAMES)
def test_without_a_band_nothing_changes(name):
    pipe, options = BUILDERS[name]()
    stock = run(pipe, options)
    with cvg.VSTAR(sigma=None).attach(pipe):
        torch.testing.assert_close(run(pipe, options), stock, rtol=1e-4, atol=1e-4)
    with cvg.VSTAR(sigma=0.5, stop=0.0).attach(pipe):
        assert torch.equal(run(pipe, options), stock)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", NAMES)
def test_the_band_is_on_the_chosen_layers_and_steps(name):
    pipe, options = BUILDERS[name]()
    stock_frames, stock = temporal_maps(pipe, options)
    widths = sorted({record.grid[2] for record in stock.records}, reverse=True)
    with cvg.VSTAR(sigma={widths[0]: 0.5}, stop=0.3).attach(pipe), cvg.capture(pipe, temporal=True) as captured:
        frames = run(pipe, options)
    assert not torch.allclose(frames, stock_frames, atol=1e-4)
    changed = {
        (new.step, new.layer)
        for new, old in zip(captured.records, stock.records, strict=True)
        if new.step == 0 and not torch.allclose(new.maps, old.maps, atol=1e-5)
    }
    wanted = {
        (0, record.layer)
        for record in stock.records
        if record.step == 0 and record.grid[2] == widths[0] and "transformer_in" not in record.layer
    }
    assert wanted <= changed  # layers behind them see other input, and change a little too


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", NAMES)
def test_the_output_is_that_of_the_definition(name):
    """A layer with a band computes what `temporal_attention` computes by its reference."""
    pipe, options = BUILDERS[name]()
    results = []
    for backend in ("auto", "reference"):
        with cvg.trace_backends() as ran, cvg.VSTAR(sigma=1.5, backend=backend).attach(pipe):
            results.append(run(pipe, options))
        kinds = {chosen for operation, chosen in ran if operation == "temporal_attention"}
        assert kinds == {"native" if backend == "auto" else "reference"}
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", NAMES)
def test_every_frame_gets_its_text(name):
    """One state is the prompt itself; two states differ first and last; the unconditional branch keeps its text."""
    pipe, options = BUILDERS[name]()
    stock = run(pipe, options)
    with cvg.VSTAR(sigma=None, prompts=[PROMPT]).attach(pipe):
        torch.testing.assert_close(run(pipe, options), stock, rtol=1e-4, atol=1e-4)

    states = [PROMPT, "a blue square"]
    text = first_text(pipe, options, cvg.VSTAR(sigma=None, prompts=states))["encoder_hidden_states"]
    unconditional, conditional = text.chunk(2)
    assert all(torch.equal(one, unconditional[0]) for one in unconditional)
    for state, frame in zip(states, (0, -1), strict=True):
        alone = first_text(pipe, options, cvg.VSTAR(sigma=None), state)["encoder_hidden_states"]
        torch.testing.assert_close(conditional[frame], alone[-1])


def first_text(pipe, options, vstar, prompt=PROMPT):
    """What the first text layer is first called with."""
    layers = attention_layers(denoisers_of(pipe)[0])
    layer = next(layer for layer in layers if layer.kind == "cross")
    seen, forward = [], layer.module.forward

    def note(*args, **kwargs):
        seen.append(kwargs)
        return forward(*args, **kwargs)

    layer.module.forward = note
    with vstar.attach(pipe):
        run(pipe, options, prompt)
    del layer.module.forward
    return seen[0]


def test_states_of_different_lengths():
    """Latte cuts the padding off the text of a prompt: a frame sees the tokens that its states have, and no others."""
    pipe, options = latte()
    options["mask_feature"] = True
    stock = run(pipe, options)
    with cvg.VSTAR(sigma=None, prompts=[PROMPT]).attach(pipe):
        torch.testing.assert_close(run(pipe, options), stock, rtol=1e-4, atol=1e-4)

    longer = PROMPT + " running"
    given = first_text(pipe, options, cvg.VSTAR(sigma=None, prompts=["a dog", longer]))
    text, mask = given["encoder_hidden_states"], given["attention_mask"]
    lengths = (mask[:, 0] == 0).sum(1).tolist()  # of [uncond, cond] · 4 frames, with begin and end
    assert text.shape[:2] == (8, 10) and lengths == [9] * 4 + [4, 10, 10, 10]
    for state, frame, length in (("a dog", 4, 4), (longer, 7, 10)):
        alone = first_text(pipe, options, cvg.VSTAR(sigma=None), state)["encoder_hidden_states"]
        torch.testing.assert_close(text[frame, :length], alone[-1])
    same = [longer, longer]
    with cvg.VSTAR(sigma=None, prompts=same).attach(pipe), cvg.capture(pipe, ["cat"]) as captured:
        run(pipe, options)
    with cvg.capture(pipe, ["cat"]) as alone:
        run(pipe, options, longer)
    conditional = [
        [one.maps for one in each.records if one.branch == "cond" and one.step == 0] for each in (captured, alone)
    ]
    torch.testing.assert_close(*conditional, rtol=1e-4, atol=1e-6)


def test_everything_is_put_back_after_an_exception():
    """In the middle of a call, when everything is in its place."""
    pipe, options = BUILDERS["animatediff"]()
    denoiser, kind = denoisers_of(pipe)[0], type(pipe)
    before = [layer.module.processor for layer in attention_layers(denoiser)]
    vstar = cvg.VSTAR(sigma=1.0, prompts=["a", "b"], trained_frames=2)
    there = []

    def stop(*_):
        there.extend(layer.module.processor for layer in attention_layers(denoiser))
        raise RuntimeError("stop")

    hook = denoiser.conv_norm_out.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"), vstar.attach(pipe):
        run(pipe, options)
    hook.remove()
    after = [layer.module.processor for layer in attention_layers(denoiser)]
    assert there != before and all(one is other for one, other in zip(after, before, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())
    assert not any("forward" in vars(m) for m in denoiser.modules())
    assert type(pipe) is kind and "encode_prompt" not in vars(pipe)


def test_longer_clips_are_squeezed_into_known_positions():
    """Every position lies between those of the trained frames, the first and last on them."""
    pipe, options = BUILDERS["animatediff"]()
    module = frame_positions(pipe.unet)[0]
    x = torch.zeros(3, 5, module.pe.shape[-1])
    with cvg.VSTAR(sigma=None, trained_frames=3).attach(pipe, own_loop=True):
        squeezed, short = module(x), module(x[:, :3])
    torch.testing.assert_close(short, module(x[:, :3]))
    known = module.pe[0, :3]
    for found, wanted in ((0, known[0]), (2, known[1]), (4, known[2])):
        torch.testing.assert_close(squeezed[0, found], wanted)
    torch.testing.assert_close(squeezed[0, 1], (known[0] + known[1]) / 2)


def test_latte_makes_clips_of_other_lengths():
    """Its network has a table of positions for one length of clip; the stock pipeline fails at any other."""
    pipe, options = latte()
    table = pipe.transformer.temp_pos_embed
    forward, used = pipe.transformer.forward, []

    def note(*args, **kwargs):
        used.append(pipe.transformer.temp_pos_embed)
        return forward(*args, **kwargs)

    pipe.transformer.forward = note
    for frames in (2, 7):
        with pytest.raises(RuntimeError), cvg.VSTAR(sigma=None).attach(pipe):
            run(pipe, {**options, "video_length": frames})
        with cvg.VSTAR(sigma=None, trained_frames=4).attach(pipe):
            assert run(pipe, {**options, "video_length": frames}).shape[1] == frames
        assert pipe.transformer.temp_pos_embed is table
        assert used[-1].shape[1] == frames
        torch.testing.assert_close(used[-1][:, -1], table[:, 1 if frames == 2 else 3])
        torch.testing.assert_close(used[-1][:, 0], table[:, 0])
    with cvg.VSTAR(sigma=None, trained_frames=4).attach(pipe):
        run(pipe, {**options, "video_length": 7})
        pipe.to(torch.float64)
        assert run(pipe, {**options, "video_length": 7}).shape[1] == 7
    assert torch.equal(pipe.transformer.temp_pos_embed, table.double())


def test_guidance_sees_the_regularised_maps():
    """Vico within VSTAR: its captured temporal maps are those of the banded layers.

    A band so wide that it is the same everywhere takes nothing from the softmax, and the loss is that without one.
    """
    pipe, options = BUILDERS["animatediff"]()
    losses = []
    for sigma in (None, 1e4, 0.3):
        vico = cvg.Vico(["cat", "dog"], iterations=1, stop=0.1)
        with cvg.VSTAR(sigma=sigma).attach(pipe), vico.attach(pipe) as made:
            run(pipe, options)
        losses.append(float(made.history[0]["loss"]))
    without, wide, narrow = losses
    assert wide == pytest.approx(without, rel=1e-5)
    assert abs(narrow - without) > 3 * abs(wide - without)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("loss", ["band", "diagonality", "roughness"])
def test_descent_on_the_band(loss):
    pipe, options = BUILDERS["animatediff"]()
    band = cvg.TemporalBand(loss=loss, iterations=5, step_size=0.02, stop=0.1)
    with band.attach(pipe) as made:
        run(pipe, options)
    losses = [float(entry["loss"]) for entry in made.history]
    assert len(losses) == 5 and losses[-1] < losses[0]


def test_losses_by_their_formulas():
    even = torch.full((2, 3, 5, 5), 0.2, dtype=torch.float64)
    eye = torch.eye(5, dtype=torch.float64).expand(2, 3, 5, 5)
    torch.testing.assert_close(diagonality(even), torch.zeros(2, 3).double())
    torch.testing.assert_close(diagonality(eye), torch.ones(2, 3).double())
    assert not diagonal_roughness(eye, 1.0).any() and not diagonal_roughness(even, 1.0).any()
    broken = eye.clone()
    broken[0, 1, 2, 2] = (
        0  # two jumps by 1 among the 4 + 2 · 3 + 2 · 2 steps of the five diagonals, at one of three places
    )
    torch.testing.assert_close(diagonal_roughness(broken, 0.3), torch.tensor([2 / 14, 0.0]).double())
    torch.testing.assert_close(diagonal_roughness(broken, 1.0), torch.tensor([2 / 42, 0.0]).double())
    assert not diagonal_roughness(broken[..., :1, :1], 1.0).any()


def test_states_from_everywhere(tmp_path):
    lines, listed = tmp_path / "states.txt", tmp_path / "states.json"
    lines.write_text("a bud\n\na flower\n")
    listed.write_text(json.dumps(["a bud", "a flower"]))
    for prompts in (["a bud", "a flower"], lines, str(listed), lambda prompt: prompt.split("|")):
        assert cvg.VSTAR(prompts=prompts).states("a bud|a flower") == ["a bud", "a flower"]
    turns = "a red circle moving left, then a blue one"
    states = ["a red circle moving left", "a blue one"]
    assert synopsis.split_at_then(turns) == states
    assert cvg.VSTAR(prompts="then").states(turns) == states
    held = cvg.VSTAR(prompts="then", hold=2).states(turns)
    assert held == [states[0], states[0], states[1], states[1]]
    with pytest.raises(cvg.ArgumentError, match="hold must be a whole number of at least 1, got 0"):
        cvg.VSTAR(hold=0)


def test_an_endpoint_writes_states():
    """A server that speaks the chat protocol; and one that is not there."""

    class Chat(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = f"Sure!\n1. {asked['model']} one\n2) two\n"
            body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        assert synopsis.endpoint_writer(url, "m")("a flower opens") == ["m one", "two"]
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(cvg.ArgumentError, match="gave no states"):
        synopsis.endpoint_writer(url, "m", seconds=1)("a flower opens")


def test_a_local_model_writes_states():
    def generate(messages, max_new_tokens):
        assert messages[0]["role"] == "user"
        return [{"generated_text": [*messages, {"role": "assistant", "content": "1. a\n2. b"}]}]

    assert synopsis.local_writer(generate)("x") == ["a", "b"]
    with pytest.raises(cvg.ArgumentError, match="no numbered lines"):
        synopsis.numbered_lines("nothing of the kind")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"sigma": {64: -1.0}}, "sigma must be positive"),
        ({"sigma": {}}, "sigma must be positive"),
        ({"sigma": "wide"}, "sigma must be positive"),
        ({"stop": 2.0}, r"stop must be a finite number in \[0, 1\], got 2.0"),
        ({"prompts": []}, "prompts must be strings and at least one"),
        ({"prompts": "no-such-file.txt"}, "prompts must be a list, a writer or a file"),
        ({"trained_frames": 1}, "trained_frames must be a whole number of at least 2, got 1"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.VSTAR(**change)


@pytest.mark.drawn(8, of="long tests")
def test_gradient_checkpointing_replays_with_the_band():
    """Guidance within VSTAR gets the same gradient with and without checkpointing."""
    norms = []
    for checkpointing in (False, True):
        pipe, options = BUILDERS["animatediff"]()
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        vico = cvg.Vico(["cat", "dog"], iterations=1, stop=0.1)
        with cvg.VSTAR(sigma=0.3).attach(pipe), vico.attach(pipe) as made:
            run(pipe, options)
        norms.append(made.history[0]["gradient_norm"])
    torch.testing.assert_close(*norms, rtol=1e-4, atol=0)
