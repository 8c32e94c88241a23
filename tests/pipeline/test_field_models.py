"""Adapters, wrappers and conditions beside the text:
what they add is not mistaken for the words, or for the latents.
"""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402
import torch  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from tests.pipeline.field import WORDS  # noqa: E402
from tests.pipelines import PIPELINES, PROMPT, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

VICO = cvg.Vico(words=WORDS, stop=0.5, iterations=2, step_size=0.01)


def heat(captured, **options):
    return torch.stack([captured.heat_map(word, **options) for word in WORDS])


def test_a_textual_inversion_is_all_of_its_vectors():
    """AnimateDiff rewrites `<thing>` to three tokens before it reads the prompt: the words behind it move."""
    pipe, options = PIPELINES["animatediff"].build()
    vectors = torch.randn(3, 8)
    pipe.load_textual_inversion({"<thing>": vectors}, token="<thing>")
    prompt = "a <thing> and a blue dog"
    with cvg.capture(pipe, words=["dog", "<thing>", "blue dog"]) as captured:
        run(pipe, options, prompt, num_inference_steps=1)
    ids = pipe.tokenizer(pipe.maybe_convert_prompt(prompt, pipe.tokenizer)).input_ids
    tokens = pipe.tokenizer.convert_ids_to_tokens(ids)
    found = {span.word: [tokens[at] for at in span.ids] for span in captured.tokens[0]}
    assert found == {"dog": ["dog"], "<thing>": ["<thing>", "<thing>_1", "<thing>_2"], "blue dog": ["blue", "dog"]}
    with cvg.Vico(words=["<thing>", "dog"], stop=0.1).attach(pipe) as made:
        run(pipe, options, prompt)
    assert set(made.history[0]["scores"][0]) == {"<thing>", "dog"}


@pytest.mark.drawn(6)
@pytest.mark.parametrize(
    "method",
    [None, VICO, cvg.Gen1(), cvg.VSTAR(sigma=None, prompts=["a red cat", "a blue dog"]), cvg.VSTAR(sigma=1.0)],
    ids=["capture", "Vico", "Gen1", "synopsis", "VSTAR"],
)
def test_freenoise_of_one_window_is_the_plain_pipeline(method):
    results = []
    for name in ("animatediff", "animatediff_freenoise_one_window"):
        pipe, options = PIPELINES[name].build()
        options = {**options, "num_frames": 8, "latents": torch.zeros(1, 4, 8, 5, 7)}
        options["latents"] = torch.randn(1, 4, 8, 5, 7, generator=torch.Generator().manual_seed(4))
        attached = (method or cvg.Vico(WORDS, iterations=0)).attach(pipe)
        with attached as made, cvg.capture(pipe, words=WORDS) as captured:
            results.append((run(pipe, options), heat(captured), made.guided))
    (frames, maps, guided), (other_frames, other_maps, other_guided) = results
    torch.testing.assert_close(other_frames, frames, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other_maps, maps, rtol=1e-3, atol=1e-5)
    assert other_guided == guided and bool(guided) == (method is not None)


@pytest.mark.drawn(8, of="long tests")
def test_an_image_prompt_is_not_taken_for_the_text():
    """At scale 0 an IP-Adapter changes nothing, neither maps nor guidance; its own attention is not captured."""
    pipe, options = PIPELINES["animatediff_ip_adapter"].build()
    plain, plain_options = PIPELINES["animatediff"].build()
    plain.unet.load_state_dict(pipe.unet.state_dict(), strict=False)
    plain.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    plain.vae.load_state_dict(pipe.vae.state_dict())
    pipe.set_ip_adapter_scale(0.0)
    results = []
    for one, call in ((pipe, options), (plain, plain_options)):
        with VICO.attach(one) as made, cvg.capture(one, words=WORDS) as captured:
            frames = run(one, call)
        results.append((frames, heat(captured), torch.stack([entry["loss"] for entry in made.history])))
        assert len(captured.records) == len({(r.step, r.layer, r.branch) for r in captured.records})
    for adapted, without in zip(*results, strict=True):
        torch.testing.assert_close(adapted, without, rtol=1e-4, atol=1e-5)


def test_the_branches_of_perturbed_attention_are_told_apart():
    """At the first step those with and without the prompt are the plain pipeline's; the third is one of its own."""
    pipe, options = PIPELINES["animatediff_pag"].build()
    plain, plain_options = PIPELINES["animatediff"].build()
    with cvg.capture(pipe, words=WORDS, steps=0) as captured:
        run(pipe, options)
    with cvg.capture(plain, words=WORDS, steps=0) as wanted:
        run(plain, plain_options)
    for branch in ("cond", "uncond"):
        torch.testing.assert_close(heat(captured, branch=branch), heat(wanted, branch=branch), rtol=1e-4, atol=1e-6)
    disturbed = heat(captured, branch="perturbed")
    assert not torch.allclose(disturbed, heat(captured), rtol=1e-3)
    with pytest.raises(cvg.ArgumentError, match="'uncond', 'cond', 'perturbed', got 'positive'"):
        captured.heat_map("cat", branch="positive")


def test_a_wrapped_network_has_the_layers_of_the_one_inside():
    """PEFT's `get_peft_model` around the transformer: before training its adapter changes nothing."""
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    pipe, options = PIPELINES["wan"].build()
    results = []
    for wrapped in (False, True):
        if wrapped:
            pipe.transformer = get_peft_model(pipe.transformer, LoraConfig(target_modules=["to_q", "to_v"], r=2))
        with VICO.attach(pipe) as made, cvg.capture(pipe, words=WORDS, layers=r"^blocks\.0\.") as captured:
            frames = run(pipe, options)
        losses = torch.stack([entry["loss"] for entry in made.history])
        results.append((frames, heat(captured), losses, {record.layer for record in captured.records}))
    (*plain, layers), (*wrapped, inside) = results
    torch.testing.assert_close(wrapped, plain)
    assert inside == layers == {"blocks.0.attn2"}


def test_a_class_derived_from_a_known_one():
    pipe, options = PIPELINES["animatediff"].build()

    class Own(diffusers.UNetMotionModel):
        def forward(self, sample, timestep, encoder_hidden_states, **options):
            return super().forward(sample, timestep, encoder_hidden_states, **options)

    with VICO.attach(pipe), cvg.capture(pipe, words=WORDS) as wanted:
        want = run(pipe, options)
    pipe.unet.__class__ = Own
    with VICO.attach(pipe), cvg.capture(pipe, words=WORDS) as captured:
        assert torch.equal(run(pipe, options), want)
    torch.testing.assert_close(heat(captured), heat(wanted))


#: Those of diffusers' pipelines that can make two videos at once.
CONDITIONED = [
    "animatediff_sdxl",
    "animatediff_sparsectrl",
    "animatediff_ip_adapter",
    "animatediff_pag",
    "pia",
    "wan_i2v",
]


@pytest.mark.drawn(3)
@pytest.mark.parametrize("name", CONDITIONED)
def test_conditions_are_cut_with_the_batch(name):
    """Whatever is batched beside the latents: each of two videos has the losses and maps that it has alone."""
    case = PIPELINES[name]
    pipe, options = case.build()
    prompts = [PROMPT, "a dog and a red cat"]
    channels = 16 if name.startswith("wan") else 4
    start = torch.randn(2, channels, *case.latents)

    def losses(prompt, latents):
        call = {**options, "num_inference_steps": 2, "latents": latents.clone()}
        if name == "animatediff_ip_adapter" and not isinstance(prompt, str):
            call["ip_adapter_image_embeds"] = [e.repeat_interleave(2, 0) for e in call["ip_adapter_image_embeds"]]
        with VICO.attach(pipe) as made, cvg.capture(pipe, words=WORDS, steps=0) as captured:
            run(pipe, call, prompt, guidance_scale=3.0)
        videos = 1 if isinstance(prompt, str) else 2
        return [
            (torch.stack([entry["loss"][at] for entry in made.history]), heat(captured, sample=at))
            for at in range(videos)
        ]

    together = losses(prompts, start)
    for sample, prompt in enumerate(prompts):
        alone = losses(prompt, start[sample : sample + 1])
        torch.testing.assert_close(together[sample], alone[0], rtol=2e-3, atol=1e-5)


def test_a_prompt_that_is_cut_off():
    """The words that the text encoder still reads are found, those behind are not."""
    pipe, options = PIPELINES["animatediff"].build()
    long = " and ".join(["a red cat"] * 6 + ["a blue dog"])
    with cvg.capture(pipe, words=["cat"]) as captured:
        run(pipe, options, long, num_inference_steps=1)
    assert captured.heat_map("cat").isfinite().all()
    with pytest.raises(cvg.ArgumentError, match="'dog'"), cvg.capture(pipe, words=["dog"]):
        run(pipe, options, long, num_inference_steps=1)
