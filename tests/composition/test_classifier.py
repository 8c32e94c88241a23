"""The classifier: shapes, saving and loading, whom it fits, and that what is frozen stays frozen."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.composition import CompositionClassifier  # noqa: E402
from tests.composition.tiny import LABELS, tiny_classifier, tiny_clip  # noqa: E402
from tests.offline_pipelines import animatediff, modelscope  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = [999.0, 666.0]


def features(classifier, count=3):
    grid = classifier.selection.grid
    return torch.rand(count, len(TIMES), 2, classifier.selection.maps, *grid) * 0.1 + 0.1


@pytest.fixture
def clip():
    """A CLIP model of random weights with its tokenizer."""
    return tiny_clip()


def test_each_step_stands_alone():
    pipe, _ = animatediff()
    classifier = tiny_classifier(pipe, TIMES)
    maps = features(classifier)
    both = classifier.step_logits(maps, torch.tensor(TIMES))
    assert both.shape == (3, 2, len(LABELS))
    for step in range(2):
        alone = classifier(maps[:, step : step + 1], torch.tensor(TIMES[step : step + 1]))
        torch.testing.assert_close(alone, both[:, step])
    torch.testing.assert_close(classifier(maps, torch.tensor(TIMES)), both.mean(1))


def test_time_layer_head_and_role_count():
    pipe, _ = animatediff()
    classifier = tiny_classifier(pipe, TIMES)
    maps, times = features(classifier, 1), torch.tensor(TIMES)
    stock = classifier(maps, times)
    assert not torch.allclose(classifier(maps, times.flip(0) - 100), stock, atol=1e-6)
    assert not torch.allclose(classifier(maps.flip(2), times), stock, atol=1e-6)
    assert not torch.allclose(classifier(maps.flip(3), times), stock, atol=1e-6)


def test_maps_of_another_selection_are_refused():
    pipe, _ = animatediff()
    classifier = tiny_classifier(pipe, TIMES)
    with pytest.raises(cvg.ArgumentError, match="maps must be"):
        classifier(features(classifier)[..., :-1], torch.tensor(TIMES))


def test_saved_and_loaded(tmp_path):
    pipe, _ = animatediff()
    classifier = tiny_classifier(pipe, TIMES, training={"accuracy": 0.5})
    classifier.save(tmp_path)
    loaded = CompositionClassifier.load(tmp_path, pipe)
    maps = features(classifier)
    assert torch.equal(loaded(maps, torch.tensor(TIMES)), classifier(maps, torch.tensor(TIMES)))
    assert (loaded.labels, loaded.selection, loaded.timesteps, loaded.report) == (
        classifier.labels,
        classifier.selection,
        classifier.timesteps,
        {"accuracy": 0.5},
    )
    assert not loaded.training


def test_the_fingerprint_survives_a_change_of_dtype(tmp_path):
    pipe, _ = animatediff()
    classifier = tiny_classifier(pipe, TIMES)
    classifier.check(pipe.to(dtype=torch.bfloat16))


def test_another_pipeline_is_refused(tmp_path):
    pipe, _ = animatediff()
    tiny_classifier(pipe, TIMES).save(tmp_path)
    with pytest.raises(cvg.ArgumentError, match="does not fit the pipeline: it was trained on UN"):
        CompositionClassifier.load(tmp_path, modelscope()[0])
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    with torch.no_grad():
        pipe.unet.get_submodule(name).to_k.weight.mul_(1.01)
    with pytest.raises(cvg.ArgumentError, match=rf"weights of '{name}' are others"):
        CompositionClassifier.load(tmp_path, pipe)


@pytest.mark.parametrize("change", ["none", "format"])
def test_what_is_no_classifier_is_refused(change, tmp_path):
    if change == "format":
        tiny_classifier(animatediff()[0], TIMES).save(tmp_path)
        path = tmp_path / "classifier.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    message = "format 2, got 99" if change == "format" else "must be a folder with classifier.json"
    with pytest.raises(cvg.ArgumentError, match=message):
        CompositionClassifier.load(tmp_path)


@pytest.mark.parametrize("labels", [["left"], ["left", "left"]])
def test_labels_are_checked(labels):
    classifier = tiny_classifier(animatediff()[0], TIMES)
    with pytest.raises(cvg.ArgumentError, match="labels must be at least two"):
        CompositionClassifier(labels, classifier.selection, TIMES, classifier.fingerprint)


def test_the_vision_language_model_stays_frozen(clip):
    model, _ = clip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classifier = tiny_classifier(animatediff()[0], TIMES, backbone={"kind": "vision-language"}, vision_language=clip)
    classifier.train()
    assert classifier.aggregator.training and not any(m.training for m in model.modules())
    trained = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    render = classifier.backbone.render.weight.detach().clone()
    logits = classifier(features(classifier), torch.tensor(TIMES))
    # Not their cross-entropy: the tiny tokenizer reads all labels alike, so its gradient is a rounding.
    logits.square().sum().backward()
    optimizer.step()
    assert logits.shape == (3, len(LABELS))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(classifier.backbone.render.weight, render)


def test_the_vision_language_backbone_reads_time_as_place(clip):
    classifier = tiny_classifier(animatediff()[0], TIMES, backbone={"kind": "vision-language"}, vision_language=clip)
    volume = torch.rand(1, 4, 4, 3, 4)
    sheet = classifier.backbone.sheet(volume)
    assert sheet.shape == (1, 3, 32, 32)
    swapped = classifier.backbone.sheet(volume.flip(2))
    torch.testing.assert_close(sheet[..., :16, :16], swapped[..., 16:, 16:])


def test_the_vision_language_classifier_is_saved_without_the_model(clip, tmp_path):
    classifier = tiny_classifier(animatediff()[0], TIMES, backbone={"kind": "vision-language"}, vision_language=clip)
    classifier.save(tmp_path)
    with pytest.raises(cvg.ArgumentError, match="vision_language must be given"):
        CompositionClassifier.load(tmp_path)
    loaded = CompositionClassifier.load(tmp_path, vision_language=clip)
    maps = features(classifier)
    torch.testing.assert_close(loaded(maps, torch.tensor(TIMES)), classifier(maps, torch.tensor(TIMES)))
    assert (tmp_path / "classifier.safetensors").stat().st_size < 100_000


def test_labels_not_trained_on(clip):
    """The head is text: other words are other labels, the same word the same logit."""
    classifier = tiny_classifier(
        animatediff()[0], TIMES, backbone={"kind": "vision-language", "template": "a {}"}, vision_language=clip
    )
    words = classifier.with_labels(["cat", "running", "dog"])
    again = words.with_labels(["dog", "cat"])
    maps, times = features(classifier), torch.tensor(TIMES)
    torch.testing.assert_close(again(maps, times), words(maps, times)[:, [2, 0]])
    with pytest.raises(cvg.ArgumentError, match="'vision-language' backbone only"):
        tiny_classifier(animatediff()[0], TIMES).with_labels(["in", "out"])
