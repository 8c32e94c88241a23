# %% [markdown]
# # Guide a video
#
# Models forget words of a prompt, or mix up what they belong to. A guidance method looks at the attention maps while
# the pipeline samples and moves the latents, so that the clip comes nearer to what was asked for. The model is not
# trained, and the pipeline stays the one of diffusers.
#
# This page guides one clip with CVG on the small pipeline that ships; nothing is downloaded.

# %%
import sys
from pathlib import Path

import torch

import cvg_kernels as cvg
from cvg_kernels import viz
from cvg_kernels.shapes import judge, load_pipeline, parse_caption

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
# ## Without guidance
#
# The seed is one that the untouched model gets wrong. The oracle of this small world reads the frames and says what of
# the prompt they show.

# %%
pipe = load_pipeline()
prompt = "a red triangle moving right and a green square moving left"
settings = {"num_frames": 8, "num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "pt"}


def clip():
    """The clip of one seed, so that guidance makes the only difference."""
    return pipe(prompt, **settings, generator=torch.Generator().manual_seed(1)).frames[0]


def verdict(frames):
    """Whether both things are there, in their colours, and move as asked."""
    return judge(frames, parse_caption(prompt))


unguided = clip()
print("unguided:", verdict(unguided))

# %% [markdown]
# ## With guidance
#
# `attach` puts the method on the pipeline for the length of the block. CVG has a classifier of attention maps; the one
# for this pipeline ships. It sees, in the first steps, which way each thing will move, and the latents go where it
# sees what was asked for.

# %%
with cvg.CVG().attach(pipe) as run:
    guided = clip()
print("guided:", verdict(guided))
print(f"{run.guided_steps} of 20 steps were guided")
show(viz.contact_sheet({"unguided": unguided, "guided": guided}), "guided.png")
viz.save_gif(guided, OUT / "guided.gif")

# %% [markdown]
# One clip proves nothing. On 200 prompts, everything is right in 52 % of the clips instead of 30 %:
# [how that was measured](../cvg.md#measured).
#
# ## What happened
#
# `history` has an entry for every evaluation: the loss, and how likely the classifier found what was asked for.

# %%
for entry in run.history:
    print(f"step {entry['step']}: loss {float(entry['loss'].mean()):.3f}")
first, last = (float(run.history[at]["loss"].mean()) for at in (0, -1))
print(f"from {first:.3f} to {last:.3f}")
viz.loss_curve(run.history, OUT / "loss.png")

# %% [markdown]
# ## More than one method, and how strongly
#
# Every method has its options, and `Together` attaches several. Vico gives every word its share of the attention; it
# needs no classifier, so it works on nearly all pipelines. Whether a method helps is another question:
# the README says for each what was measured.

# %%
both = cvg.Together((cvg.CVG(step_size=0.03), cvg.Vico(stop=0.1)))
with both.attach(pipe) as run:
    together = clip()
print("both:", verdict(together))
show(viz.contact_sheet({"CVG": guided, "CVG and Vico": together}), "both.png")

# %% [markdown]
# After the block the pipeline is what it was: the same seed makes the clip of before.

# %%
print("as before:", torch.equal(clip(), unguided))

# %% [markdown]
# Next: [a method of your own](../pipelines.md#writing-a-method), or
# [a classifier for another pipeline](train_a_classifier.py).
