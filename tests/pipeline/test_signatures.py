"""Classes of somebody's own, whose methods hand on `*args, **kwargs`: their arguments are found by name."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.pipeline.signatures import named_arguments  # noqa: E402
from tests.pipelines import PIPELINES, PROMPT  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Named:
    def call(self, first, second=2, *, third=3, **others):
        return None


class Handing(Named):
    def call(self, *given, **options):
        return super().call(*given, **options)


@pytest.mark.parametrize("kind", [Named, Handing])
@pytest.mark.parametrize(
    ("args", "kwargs"), [((1,), {}), ((1, 5), {"third": 6}), ((), {"first": 1, "new": 8}), ((1,), {"second": 0})]
)
def test_arguments_are_named_as_the_class_that_names_them_says(kind, args, kwargs):
    expected = {**dict(zip(("first", "second"), args, strict=False)), **kwargs}
    assert named_arguments(kind, "call", "first", args, kwargs) == expected


def house(kind, *methods):
    """A class derived from one of diffusers that overrides methods and hands on what they are given."""

    def handing(name):
        def method(self, *args, **options):
            return getattr(super(made, self), name)(*args, **options)

        return method

    made = type("House", (kind,), {name: handing(name) for name in methods})
    return made


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", ["animatediff", "wan", "cogvideox"])
def test_a_pipeline_of_somebodys_own(name):
    """The prompt without a name, a scheduler, a network and an encoder that only hand on."""
    runs = []
    for own in (False, True):
        pipe, options = PIPELINES[name].build()
        network = pipe.unet if name == "animatediff" else pipe.transformer
        if own:
            pipe.__class__ = house(type(pipe), "__call__", "encode_prompt")
            pipe.scheduler.__class__ = house(type(pipe.scheduler), "step")
            network.__class__ = house(type(network), "forward")
        settings = {**options, "num_inference_steps": 2, "output_type": "latent"}
        settings["generator"] = torch.Generator().manual_seed(0)
        # the prompt is the first argument of each
        with cvg.Vico(["cat", "dog"], stop=0.5).attach(pipe) as run, cvg.capture(pipe, ["cat"]) as seen:
            video = pipe(PROMPT, **settings)[0]
        assert run.guided == [(0, 0)]
        runs.append((video, seen.heat_map("cat")))
    for stock, own in zip(*runs, strict=True):
        assert torch.equal(own, stock)
