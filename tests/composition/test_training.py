"""From clips to a classifier: inversion, features on disk, and a training that stops, goes on and shares its work."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.cli import main  # noqa: E402
from cvg_kernels.composition import CompositionClassifier  # noqa: E402
from cvg_kernels.shapes.classifier_clips import LABELS, Clips  # noqa: E402
from cvg_kernels.shapes.pipeline import load_pipeline  # noqa: E402
from cvg_kernels.shapes.world import DIRECTIONS, parse_caption, random_scene, render  # noqa: E402
from cvg_kernels.training.checkpoint import Checkpoint  # noqa: E402
from cvg_kernels.training.dataset import Entities, split  # noqa: E402
from cvg_kernels.training.features import make_features  # noqa: E402
from cvg_kernels.training.inversion import add_noise, ddim_invert  # noqa: E402
from cvg_kernels.training.score import score  # noqa: E402
from cvg_kernels.training.store import GENERATED, RIGHT_PROMPT, WRONG_PROMPT, Examples, load, write_index, write_shard  # noqa: E402
from cvg_kernels.training.symmetry import SYMMETRIES, mirrored, permutations  # noqa: E402
from cvg_kernels.training.train import Recipe, train_classifier  # noqa: E402
from tests.composition.tiny import tiny_clip  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "aggregator": {"channels": 4, "width": 8, "depth": 1, "heads": 2},
    "backbone": {"kind": "small-video-net", "width": 4, "dropout": 0.0},
}
RECIPE = Recipe(steps=6, batch=8, read_steps=2, rate=3e-3)


def write_features(folder, clips=48, columns=4):
    """Made-up features whose label is where the entity's maps are brighter: left, right, top or bottom."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(4, (clips, 2), generator=generator)
    maps = 0.1 + 0.01 * torch.randn(clips, 2, 2, 3, 4, 4, columns, generator=generator)
    for clip in range(clips):
        for entity in range(2):
            x, y = DIRECTIONS[LABELS[label[clip, entity]]]
            view = maps[clip, :, entity]
            part = view.movedim(-1 if x else -2, -1)
            part[..., slice(0, 2) if x + y < 0 else slice(2, 4)] += 0.03
    source = torch.arange(clips) % 3
    write_index(
        folder / "features",
        {
            "labels": LABELS,
            "timesteps": [999.0, 949.0],
            "layers": ["a", "b"],
            "heads": [1, 2],
            "grid": [4, 4, columns],
            "fingerprint": {"class": "None", "norms": {}},
            "recipe": {},
        },
    )
    asked = torch.where((source == WRONG_PROMPT)[:, None], (label + 1) % 4, label)
    write_shard(
        folder / "features" / "000000.safetensors",
        Examples(maps.half(), label.to(torch.int8), asked.to(torch.int8), source.to(torch.uint8), torch.arange(clips)),
    )


def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.mark.drawn(8, of="long tests")
def test_an_inverted_clip_comes_back(pipe):
    """Clip → noise → clip by DDIM without guidance; with the refined prediction closely."""
    scene = random_scene(np.random.default_rng(5), parse_caption("a red circle moving left"))
    with torch.no_grad():
        clean = pipe.vae.encode(render([scene])[0] * 2 - 1).latent_dist.mean
    clean = clean.transpose(0, 1)[None]
    errors = []
    for refine in (0, 1):
        noise = ddim_invert(pipe, clean, [scene.caption], steps=20, refine=refine)
        back = pipe(
            scene.caption,
            latents=noise,
            output_type="latent",
            height=64,
            width=64,
            num_frames=8,
            num_inference_steps=20,
            guidance_scale=1.0,
        ).frames
        errors.append(float((back - clean).norm() / clean.norm()))
    assert errors[1] < 0.1 and errors[1] < errors[0] / 2


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_inversion_undoes_the_scheduler(kind):
    """Step by step, where the denoiser says the same of a step whatever it is given."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    said = {int(timestep): torch.randn(1, 4, 2, 8, 8) for timestep in scheduler.timesteps}
    noise = latents = torch.randn(1, 4, 2, 8, 8, dtype=torch.float64)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(said[int(timestep)], timestep, latents).prev_sample
    pipe = load_pipeline()
    pipe.scheduler = scheduler
    pipe.unet.forward = lambda latents, timestep, text, return_dict: (said[timestep],)
    found = ddim_invert(pipe, latents, ["a red circle moving left"], steps=10)
    torch.testing.assert_close(found, noise, rtol=1e-4, atol=1e-5)


def test_noising_has_the_level_of_the_first_step(pipe):
    clean = torch.zeros(4, 4, 8, 8, 8)
    noisy = add_noise(pipe, clean, steps=20, generator=torch.Generator().manual_seed(0))
    assert noisy.std() == pytest.approx(1.0, abs=0.05)


def test_a_flow_model_cannot_be_inverted():
    from tests.offline_pipelines import wan

    with pytest.raises(cvg.ArgumentError, match="pipe must have a UNet"):
        ddim_invert(wan()[0], torch.zeros(1, 16, 3, 4, 4), ["a cat"], steps=2)


@pytest.mark.drawn(8, of="long tests")
def test_features_of_the_shapes_world(pipe, tmp_path):
    """Both kinds of clips, both inversions, cut off and taken up by two processes: what one would have made."""
    clips = Clips(real=2, generated=1, read_steps=2, steps=3)
    make_features(tmp_path / "one", pipe, clips)
    for rank in (0, 1):
        make_features(tmp_path / "two", pipe, clips, rank=rank, processes=2)
    index, examples = load(tmp_path / "one")
    _, again = load(tmp_path / "two")
    assert index["labels"] == list(LABELS) and len(index["timesteps"]) == 2
    assert examples.source.tolist() == [RIGHT_PROMPT] * 2 + [WRONG_PROMPT] * 2 + [GENERATED]
    assert examples.clip.tolist() == [0, 1, 0, 1, 2]
    torch.testing.assert_close(examples.maps, again.maps, rtol=1e-2, atol=1e-3)
    assert torch.equal(examples.label, again.label)
    right, wrong = examples.where(examples.source == 0), examples.where(examples.source == 1)
    there = right.label >= 0
    assert torch.equal(right.label, right.asked) and torch.equal(right.label, wrong.label)
    assert (wrong.label != wrong.asked)[there].all()
    assert not torch.equal(right.maps, wrong.maps)
    with pytest.raises(cvg.ArgumentError, match="was made with another timesteps, recipe"):
        make_features(tmp_path / "one", pipe, replace(clips, steps=4))


def test_no_features_is_an_error(tmp_path):
    with pytest.raises(cvg.ArgumentError, match="must hold features"):
        train_classifier(tmp_path, RECIPE, accelerator())


@pytest.mark.drawn(8, of="long tests")
def test_training_learns(tmp_path):
    write_features(tmp_path, clips=96)
    recipe = replace(RECIPE, steps=120, batch=16, rate=1e-2)
    classifier = train_classifier(tmp_path, recipe, accelerator(), **SMALL)
    for source in ("right_prompt", "wrong_prompt", "generated"):
        assert classifier.report[source]["accuracy"] > 0.6, classifier.report
    assert classifier.report["wrong_prompt"]["says_the_lie"] < 0.3
    loaded = CompositionClassifier.load(tmp_path / "classifier")
    assert loaded.report == json.loads((tmp_path / "report.json").read_text())


def test_a_stopped_training_goes_on_as_it_would_have(tmp_path):
    """Dropout included."""
    options = {**SMALL, "backbone": {"kind": "small-video-net", "width": 4, "dropout": 0.5}}

    class Stopped(Exception):
        pass

    def save_then_stop(checkpoint, step):
        if step == 3:
            checkpoint.save(step)
            raise Stopped

    for name in ("whole", "stopped"):
        write_features(tmp_path / name)
    whole = train_classifier(tmp_path / "whole", RECIPE, accelerator(), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "save_sometimes", save_then_stop)
        with pytest.raises(Stopped):
            train_classifier(tmp_path / "stopped", RECIPE, accelerator(), **options)
    resumed = train_classifier(tmp_path / "stopped", RECIPE, accelerator(), **options)
    one, other = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def two_processes(folder):
    """What each of two processes does."""
    torch.set_num_threads(1)
    shared = accelerator()
    assert shared.num_processes == 2
    train_classifier(folder, RECIPE, shared, **SMALL)


@pytest.mark.drawn(8, of="long tests")
def test_two_processes_compute_the_same(tmp_path):
    from accelerate import debug_launcher
    from accelerate.state import AcceleratorState

    for name in ("one", "two"):
        write_features(tmp_path / name)
    one = train_classifier(tmp_path / "one", RECIPE, accelerator(), **SMALL)
    AcceleratorState._reset_state(reset_partial_state=True)  # the processes are forks
    debug_launcher(two_processes, (tmp_path / "two",), num_processes=2)
    two = CompositionClassifier.load(tmp_path / "two" / "classifier")
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_dual_inversion_can_be_left_out(tmp_path):
    """In a folder of its own, on the features of the other run."""
    write_features(tmp_path)
    single = replace(RECIPE, dual=False)
    with_both = train_classifier(tmp_path, RECIPE, accelerator(), **SMALL)
    with pytest.raises(cvg.ArgumentError, match="was made with another dual"):
        train_classifier(tmp_path, single, accelerator(), **SMALL)
    other = {"features": tmp_path / "features", **SMALL}
    without = train_classifier(tmp_path / "single", single, accelerator(), **other)
    assert not torch.equal(with_both.backbone.head.weight, without.backbone.head.weight)
    assert "wrong_prompt" in without.report  # the leakage probe is there all the same


@pytest.mark.parametrize(
    ("change", "message"),
    [({"read_steps": 3}, "read_steps must be at most the 2"), ({}, "mirror must be False unless")],
)
def test_a_recipe_must_fit_the_features(change, message, tmp_path):
    write_features(tmp_path, columns=5)
    with pytest.raises(cvg.ArgumentError, match=message):
        train_classifier(tmp_path, replace(RECIPE, **change), accelerator(), **SMALL)


def test_inversions_of_a_clip_are_on_the_same_side(tmp_path):
    write_features(tmp_path)
    training, test = split(load(tmp_path / "features")[1])
    assert set(training.clip.tolist()).isdisjoint(test.clip.tolist())
    assert len(training) + len(test) == 48 and len(test) == 6


def test_score_counts(tmp_path):
    """A classifier that says what the prompt says: right with the right prompt, and it says the lie."""
    write_features(tmp_path)
    _, examples = load(tmp_path / "features")
    entities = Entities.of(examples)

    class Parrot:
        timesteps = [999.0, 949.0]
        labels = LABELS
        at = 0

        def step_logits(self, maps, timesteps):
            places = entities.places[self.at : self.at + len(maps)]
            self.at += len(maps)
            asked = examples.asked[places[:, 0], places[:, 1]].long()
            return torch.nn.functional.one_hot(asked, len(LABELS)).float()[:, None].repeat(1, 2, 1)

    report = score(Parrot(), examples)
    assert report["right_prompt"]["accuracy"] == 1 and report["wrong_prompt"]["accuracy"] == 0
    assert report["wrong_prompt"]["says_the_lie"] == 1 and report["generated"]["entities"] == 32


def test_symmetries_move_maps_and_labels_alike():
    """A bright side of the map goes where the label says."""
    table = permutations(list(LABELS))
    assert sorted(map(tuple, table.tolist())) == sorted({tuple(row) for row in table.tolist()})
    for label in range(4):
        x, y = DIRECTIONS[LABELS[label]]
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        one = ((columns - 1.5) * x + (rows - 1.5) * y > 0).float()
        count = len(SYMMETRIES)
        maps, moved = mirrored(one.expand(count, 4, 4), torch.full((count,), label), table, torch.arange(count))
        for shown, now in zip(maps, moved, strict=True):
            x, y = DIRECTIONS[LABELS[now]]
            assert torch.equal(shown, ((columns - 1.5) * x + (rows - 1.5) * y > 0).float())
    assert (table[:, LABELS.index("nowhere")] == LABELS.index("nowhere")).all()
    ways = dict(zip(("left of", "right of", "above", "below"), ("left", "right", "up", "down"), strict=True))
    relations = permutations([*ways, "behind"])
    as_motions = permutations([*ways.values(), "behind"])
    assert torch.equal(relations, as_motions) and (relations[:, 4] == 4).all()


class Loaded:
    """Keeps what a checkpoint has of one of its parts."""

    def load_state_dict(self, state) -> None:
        self.state = state


def test_a_frozen_backbone_is_trained_with(tmp_path):
    """Stopped and taken up too, without its weights in the checkpoint."""
    write_features(tmp_path)
    model, tokenizer = tiny_clip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {
        "aggregator": SMALL["aggregator"],
        "backbone": {"kind": "vision-language"},
        "vision_language": (model, tokenizer),
    }
    train_classifier(tmp_path, RECIPE, accelerator(), **options)
    again = train_classifier(tmp_path, RECIPE, accelerator(), **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    parts = {name: Loaded() for name in ("model", "optimizer", "schedule")}
    assert Checkpoint(tmp_path / "classifier.safetensors", **parts).resume() == RECIPE.steps
    saved = parts["model"].state
    assert saved.keys() == again.state_dict().keys()
    assert saved and not any("model." in name for name in saved)


def test_noised_clips(pipe, tmp_path):
    make_features(tmp_path, pipe, Clips(real=1, generated=0, noise=True, read_steps=1, steps=2))
    _, examples = load(tmp_path)
    right, wrong = examples.maps
    assert examples.source.tolist() == [RIGHT_PROMPT, WRONG_PROMPT]
    assert torch.isfinite(right).all() and not torch.equal(right, wrong)


@pytest.mark.drawn(8, of="whole trainings")
def test_the_command(tmp_path, capsys):
    arguments = [
        "cvg",
        "train",
        "--output",
        str(tmp_path),
        "--clips",
        "1",
        "--generated",
        "2",
        "--steps",
        "2",
        "--batch",
        "2",
        "--read-steps",
        "2",
        "--cpu",
    ]
    assert main(arguments) == 0
    assert CompositionClassifier.load(tmp_path / "classifier", load_pipeline()).labels == LABELS
    assert "right_prompt" in capsys.readouterr().out
    assert main(["cvg", "train", "--steps", "0"]) == 2
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
