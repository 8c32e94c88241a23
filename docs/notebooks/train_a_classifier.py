# %% [markdown]
# # Train a classifier
#
# CVG steers by a classifier that reads attention maps and says which way each thing of the prompt will move. The one
# for the shapes pipeline ships. This page trains another from nothing, in the same three steps, but far too short: it
# shows the way, and its classifier knows next to nothing. On the command line, `cvg-kernels cvg train` does all of it.

# %%
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator

import cvg_kernels as cvg
from cvg_kernels import viz
from cvg_kernels.shapes import load_pipeline
from cvg_kernels.shapes.classifier_clips import LABELS, Clips
from cvg_kernels.training.features import make_features
from cvg_kernels.training.store import load
from cvg_kernels.training.train import Recipe, train_classifier

JUPYTER = "get_ipython" in globals()
OUT = Path("out/notebooks" if JUPYTER or len(sys.argv) < 2 else sys.argv[1])  # where pictures go
OUT.mkdir(parents=True, exist_ok=True)


def show(image, name):
    """Keeps a picture, and shows it in Jupyter."""
    image.save(OUT / name)
    if JUPYTER:
        from IPython.display import display

        display(image)


# %% [markdown]
# ## 1. Clips whose answer is known
#
# Two sources. Real clips of the world are *inverted*: noise is found from which the model would make them, once with
# the right prompt and once with one that lies about the direction, so that the classifier learns to trust the maps and
# not the words. Other clips are generated, and an oracle reads what they show.
#
# The one that ships saw 300 real and 1200 generated clips at 8 steps of 20. Here there are 8 and 8, at 2 steps of 6.

# %%
pipe = load_pipeline()
run = Path(tempfile.mkdtemp())
clips = Clips(real=8, generated=8, read_steps=2, steps=6)
make_features(run / "features", pipe, clips)

# %% [markdown]
# ## 2. What the classifier sees
#
# The maps of the words of each thing, of all layers and heads, with the label that is true of the clip.

# %%
index, examples = load(run / "features")
print("labels:", ", ".join(LABELS))
print(f"{len(examples)} examples: maps {tuple(examples.maps.shape)}")
print("[examples, steps, things, layers × heads, frames, rows, columns]")

# %% [markdown]
# One thing of one real clip, averaged over layers and heads, at the first step, which is nearly all noise:

# %%
heat = examples.maps[0, 0, 0].float().mean(0)
print("it moves", LABELS[int(examples.label[0, 0])])
show(
    viz.contact_sheet({"attention at the first step": viz.overlay(torch.zeros(len(heat), 3, 64, 64), heat)}),
    "seen.png",
)

# %% [markdown]
# ## 3. Train
#
# A small 3-D network; one clip in eight is kept for the test. The one that ships had 1000 steps of 64.

# %%
recipe = Recipe(steps=30, batch=8, read_steps=2)
classifier = train_classifier(run, recipe, Accelerator(cpu=True))
for source in ("right_prompt", "wrong_prompt", "generated"):
    if source in classifier.report:
        scores = classifier.report[source]
        print(f"{source}: right on {scores['accuracy']:.0%} of {scores['entities']} entities")

# %% [markdown]
# So few clips say nothing. For comparison, the classifier that ships, on clips it was not trained on:

# %%
shipped = cvg.CVG().reader.report
print(f"the one that ships: right on {shipped['right_prompt']['accuracy']:.0%} of the entities of real clips")

# %% [markdown]
# ## Use it
#
# `CVG` takes the classifier or its folder, and refuses one that was trained for another pipeline.

# %%
settings = {"num_frames": 8, "num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "pt"}
with cvg.CVG(classifier=run / "classifier").attach(pipe) as guided:
    frames = pipe("a red triangle moving right", **settings, generator=torch.Generator().manual_seed(1)).frames[0]
print(f"{guided.guided_steps} steps were guided by it")
show(viz.contact_sheet({"guided by a classifier that knows next to nothing": frames}), "by_its_classifier.png")

# %% [markdown]
# In full, with what it takes to go on after a kill and to use several devices:
#
#     cvg-kernels cvg train --output classifier-run
#
# [CVG](../cvg.md) tells how well the one that ships reads, and what guidance by it is worth.
