"""Content: embeddings of images and texts, the tokens they become, and the prior between them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from cvg_kernels.editing.content import content_tokens, embed_images, embed_texts, predict_image_embedding  # noqa: E402
from cvg_kernels.shapes.train_prior import build_prior_scheduler  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*grad")]


def test_embeddings_have_length_one_and_images_are_resized(editor):
    with torch.no_grad():
        images = torch.rand(3, 3, 64, 64)
        found = embed_images(editor.content_encoder, images)
        large = torch.nn.functional.interpolate(images, (128, 128), mode="nearest")
        again = embed_images(editor.content_encoder, large)
        texts = embed_texts(editor.content_encoder, editor._tokens(["a red circle", "a blue square"]))
    assert found.shape == (3, 256) and texts.shape == (2, 256)
    for each in (found, texts):
        torch.testing.assert_close(each.norm(dim=1), torch.ones(len(each)))
    assert (found * again).sum(1).min() > 0.99
    assert not torch.equal(texts[0], texts[1])


def test_tokens_are_the_embedding_cut_up_with_variance_one():
    embedding = torch.nn.functional.normalize(torch.randn(2, 256), dim=1)
    tokens = content_tokens(embedding, 64)
    assert tokens.shape == (2, 4, 64)
    torch.testing.assert_close(tokens.flatten(1) / 16, embedding)
    torch.testing.assert_close(tokens.square().mean((1, 2)), torch.ones(2))


def test_a_regression_is_one_call_and_a_diffusion_follows_its_generator(editor):
    texts = torch.nn.functional.normalize(torch.randn(2, 256), dim=1)
    found = predict_image_embedding(editor.prior, texts)
    with torch.no_grad():
        wanted = editor.prior(torch.zeros(2, 256), 0, 16 * texts).predicted_image_embedding
    torch.testing.assert_close(found, torch.nn.functional.normalize(wanted, dim=1))

    def sampled(seed):
        return predict_image_embedding(
            editor.prior, texts, build_prior_scheduler(), steps=3, generator=torch.Generator().manual_seed(seed)
        )

    assert torch.equal(sampled(1), sampled(1)) and not torch.equal(sampled(1), sampled(2))
    torch.testing.assert_close(sampled(1).norm(dim=1), torch.ones(2))
