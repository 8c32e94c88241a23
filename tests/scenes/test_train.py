"""`scenes train`: every stage, cut off and gone on with, to a pipeline that runs; and the measurements on what it
made.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.cli import main  # noqa: E402
from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.prompts.words import content_words, nouns_and_verbs  # noqa: E402
from cvg_kernels.scenes import attribution  # noqa: E402
from cvg_kernels.scenes import train as training  # noqa: E402
from cvg_kernels.scenes.captions import all_words, parse_caption  # noqa: E402
from cvg_kernels.scenes.evaluation import KINDS, evaluate, judge_prompts, prompts_of  # noqa: E402
from cvg_kernels.scenes.kept import KeptClips  # noqa: E402
from cvg_kernels.scenes.latents import captions_of  # noqa: E402
from cvg_kernels.scenes.pipeline import load_pipeline, sample  # noqa: E402
from cvg_kernels.scenes.train import Recipe, train  # noqa: E402
from cvg_kernels.scenes.verdict import FAILURES  # noqa: E402
from cvg_kernels.shapes.latents import load_shards, tokenize  # noqa: E402

RECIPE = Recipe(
    autoencoder_steps=2,
    pictures=6,
    image_steps=2,
    clips=6,
    video_steps=2,
    decoder_steps=2,
    transformer_image_steps=2,
    transformer_video_steps=2,
    transformer_video_steps_2=2,
    video_autoencoder_steps=2,
)


def small_batches_by(patch):
    """The same networks, a few samples a step."""
    patch.setattr(training, "IMAGES", replace(training.IMAGES, samples=2))
    patch.setattr(training, "VIDEO", replace(training.VIDEO, samples=1))
    patch.setattr(training, "PICTURES", tuple(replace(stage, samples=2) for stage in training.PICTURES))
    patch.setattr(training, "CLIPS", tuple(replace(stage, samples=1) for stage in training.CLIPS))
    for batch in ("train_autoencoder._BATCH", "video_autoencoder._BATCH"):
        patch.setattr(f"cvg_kernels.scenes.{batch}", 2)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    small_batches_by(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with everything in it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        small_batches_by(patch)
        train(folder, RECIPE, device=torch.device("cpu"))
    return folder


@pytest.mark.drawn(8, of="whole trainings")
def test_the_pipeline_makes_clips(run):
    pipe = load_pipeline(run / "pipeline")
    assert type(pipe).__name__ == "AnimateDiffPipeline"
    with cvg.capture(pipe, words=["circle", "square"]) as captured:
        clips = sample(pipe, ["a red circle left of a blue square"], [3], steps=2)
    assert clips.shape == (1, 8, 3, 64, 64) and clips.isfinite().all()
    assert {record.grid[1] for record in captured.records} == {16, 8, 4}
    for word in all_words():
        assert len(pipe.tokenizer(word).input_ids) == 3, word


@pytest.fixture(scope="module")
def transformer(run):
    """The transformer's pipeline, trained on the same latents."""
    with pytest.MonkeyPatch.context() as patch:
        small_batches_by(patch)
        return train(run, RECIPE, device=torch.device("cpu"), network="transformer")


@pytest.mark.drawn(8, of="whole trainings")
def test_the_transformer_makes_clips(transformer):
    pipe = load_pipeline(transformer)
    assert type(pipe).__name__ == "CogVideoXPipeline"
    with cvg.capture(pipe, words=["circle", "square"]) as captured:
        clips = sample(pipe, ["a red circle left of a blue square"], [3], steps=2)
    assert clips.shape == (1, 8, 3, 64, 64) and clips.isfinite().all()
    assert {record.grid for record in captured.records} == {(8, 8, 8)}
    for word in all_words():
        assert len(pipe.tokenizer(word).input_ids) == 2, word


@pytest.mark.drawn(8, of="whole trainings")
def test_both_networks_measured_alike(transformer, tmp_path):
    few = ["--prompts", "2", "--seeds", "2", "--steps", "2"]
    assert main(["scenes", "gate", "--model", str(transformer), *few, "--json", str(tmp_path / "gate.json")]) == 0
    assert set(json.loads((tmp_path / "gate.json").read_text())["presence"]) == {"8×8"}


def test_captions_are_those_of_the_shards(run):
    """The transformer's tokens are made anew from the captions' numbers."""
    from cvg_kernels.shapes.files import load_tokenizer

    tokenizer = load_tokenizer(run / "tokenizer")
    for number, name in enumerate(("images-1", "images-2", "video")):
        whole = name == "video"
        first = 0 if whole else number * RECIPE.pictures
        captions = captions_of(seed=RECIPE.seed, clips=6, first=first, whole=whole)
        assert torch.equal(load_shards(run / f"latents-{name}")[1], tokenize(tokenizer, captions))


def test_another_network_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ArgumentError, match="network must be 'unet' or 'transformer', got 'rnn'"):
        train(tmp_path / "run", RECIPE, device=torch.device("cpu"), network="rnn")
    assert not (tmp_path / "run").exists()


@pytest.mark.drawn(8, of="long tests")
def test_made_again_it_changes_nothing(run):
    weights = run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    train(run, RECIPE, device=torch.device("cpu"))
    assert weights.read_bytes() == before


def test_the_decoder_learns_alone(run):
    """Latents are those of the first autoencoder, pictures are not."""
    from diffusers import AutoencoderKL

    first, last = (AutoencoderKL.from_pretrained(run / name) for name in ("autoencoder", "vae"))
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = [vae.encode(picture).latent_dist.mean for vae in (first, last)]
        assert torch.equal(*latents)
        assert not torch.equal(first.decode(latents[0]).sample, last.decode(latents[0]).sample)


@pytest.mark.drawn(8, of="long tests")
def test_gate_and_attribution(run, tmp_path, capsys, monkeypatch):
    pipeline = str(run / "pipeline")
    few = ["--prompts", "2", "--seeds", "2", "--steps", "3"]
    assert main(["scenes", "gate", "--model", pipeline, *few, "--json", str(tmp_path / "gate.json")]) == 0
    gate = json.loads((tmp_path / "gate.json").read_text())
    beside = ("wrong relation", "extra", "all right")
    shares = [one["rate"] for kind, one in gate["failures"].items() if kind not in beside]
    assert sum(shares) == pytest.approx(1)
    assert set(gate["presence"]) == {"16×16", "8×8", "4×4"}
    monkeypatch.setattr(attribution, "NOISE", (0.5,))
    arguments = ["--model", pipeline, "--clips", "2", "--json", str(tmp_path / "maps.json")]
    arguments += ["--figure", str(tmp_path / "maps.png")]
    assert main(["scenes", "attribution", *arguments]) == 0
    found = json.loads((tmp_path / "maps.json").read_text())["attribution"]
    assert 0 < found["slow"]["0.5"]["exact flow"]["average_precision"]["mean"] < 1
    assert "hard path flow, A + I" in capsys.readouterr().out
    with Image.open(tmp_path / "maps.png") as figure:
        assert figure.width > 3 * figure.height  # a panel for each motion


@pytest.mark.drawn(8, of="whole trainings")
def test_methods_are_scored_on_every_kind_of_prompt(run, tmp_path, capsys):
    arguments = ["--guidance", "none,temporal-band", "--prompts", "2", "--steps", "2", "--kinds", "motion,relation"]
    out = tmp_path / "eval.json"
    assert main(["scenes", "eval", "--model", str(run / "pipeline"), *arguments, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert list(report["kinds"]) == ["motion", "relation", "all"]
    for kind, results in report["kinds"].items():
        assert list(results) == ["none", "temporal-band"]
        for entry in results.values():
            ends = ("right", *FAILURES)
            assert sum(entry[end]["mean"] for end in ends) == pytest.approx(1)
            assert entry["relation"]["n"] == 0 or kind != "motion"
        difference = results["temporal-band"]["against_first"]["change"]["difference"]
        means = [results[name]["change"]["mean"] for name in results]
        assert difference == pytest.approx(means[1] - means[0]) and difference != 0
    for name in ("none", "temporal-band"):
        each = [report["kinds"][kind][name]["change"]["mean"] for kind in ("motion", "relation", "all")]
        assert each[2] == pytest.approx(sum(each[:2]) / 2)
    printed = capsys.readouterr().out
    assert "2 prompts of each kind, seed 0" in printed and "  1  temporal-band\n" in printed
    table = printed.partition("\nchange ")[2].splitlines()
    assert table[0].split() == ["motion", "relation", "all"]
    means, differences = (re.findall(r"([-+]?\d+\.\d) \[", row) for row in table[1:3])
    assert means == [f"{100 * report['kinds'][kind]['none']['change']['mean']:.1f}" for kind in report["kinds"]]
    assert len(differences) == 3


@pytest.mark.drawn(8, of="whole trainings")
def test_an_evaluation_that_was_stopped_goes_on(run, tmp_path, monkeypatch):
    """Clips that are kept are not made again, and the report is that of one run, but for the seconds."""
    pipe, clips = load_pipeline(run / "pipeline"), tmp_path / "clips.jsonl"
    calls = []
    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    given = {"model": "x", "prompts": 3, "seed": 4, "kinds": ["things"], "steps": 2}
    methods = {"none": None, "vico": cvg.Vico(iterations=1)}
    whole = evaluate(pipe, methods, **given)

    def interrupt(name, done):
        if name == "vico":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, methods, kept=KeptClips(clips), progress=interrupt, **given)
    made = len(clips.read_text().splitlines())
    assert 3 < made < 6  # all of the first method, and a batch of the second
    clips.write_text(clips.read_text() + '{"key": "ab')  # a line that was cut off
    calls.clear()
    resumed = evaluate(pipe, methods, kept=KeptClips(clips), **given)
    assert calls
    assert len(clips.read_text().splitlines()) == 6 + 1
    calls.clear()
    again = evaluate(pipe, methods, kept=KeptClips(clips), **given)
    assert not calls and again == resumed
    for report in (whole, resumed):
        for entry in report["kinds"]["things"].values():
            assert entry.pop("seconds_per_clip") > 0
    assert whole == resumed


@pytest.mark.drawn(8, of="whole trainings")
@pytest.mark.parametrize("kind, words", [("things", None), ("relation", nouns_and_verbs)])
def test_prompts_with_other_numbers_of_words_are_guided_together(run, kind, words):
    """As the same clips one by one: in a batch, methods ask for as many words in every prompt."""
    pipe, method = load_pipeline(run / "pipeline"), cvg.Vico(words=words, iterations=1)
    asked = prompts_of(kind, 4, 2)
    assert len({len((words or content_words)(str(prompt))) for prompt in asked}) > 1
    together = judge_prompts(pipe, asked, 5, method, steps=2)
    assert len(together) == 4
    for number, prompt in enumerate(asked):
        clip = sample(pipe, [str(prompt)], [5 * 1_000_003 + number], guidance=method, steps=2)[0]
        assert together[number].change == pytest.approx(float((clip[1:] - clip[:-1]).abs().mean()), rel=1e-3)


def test_prompts_are_of_their_kind_and_can_be_read_back():
    for kind in KINDS:
        for caption in prompts_of(kind, 12, 3):
            assert parse_caption(str(caption)) == caption
            assert (caption.relation is not None) == (kind == "relation")
            assert (caption.things[0].count > 1) == (kind == "number")
            assert all((thing.speed is not None) == (kind == "motion") for thing in caption.things)
        assert prompts_of(kind, 12, 3)[:5] == prompts_of(kind, 5, 3) != prompts_of(kind, 5, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["eval", "--model", "x", "--kinds", "things,colour"], "--kinds must be different ones of things, relation"),
        (["eval", "--model", "x", "--guidance", "magic"], "guidance must be one of"),
        (["train", "--image-steps", "0"], "image_steps must be positive"),
        (["train", "--device", "nowhere"], "--device nowhere cannot be used"),
        (["gate", "--model", "x", "--prompts", "1"], "--prompts must be at least 2"),
        (["gate", "--model", "x", "--seeds", "1"], "--seeds must be at least 2"),
        (["attribution", "--model", "x", "--clips", "0"], "--clips must be at least 2"),
        (
            ["attribution", "--model", "x", "--figure", "no/such/folder.png"],
            "--figure must lie in a folder that exists",
        ),
        (["eval", "--model", "x", "--clips", "no/such/clips.jsonl"], "--clips must lie in a folder that exists"),
        (["gate", "--model", "nothing/here"], "must hold a diffusers pipeline"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["scenes", *arguments]) == 2
    assert message in capsys.readouterr().err
