# %% [markdown]
# # Where does each word look?
#
# A text-to-video model reads the prompt through cross-attention: every place of the video asks every word how much it
# has to say there. `capture` records the answers while the pipeline runs, and changes nothing else.
#
# The first half uses the small pipeline that ships with the library, so nothing is downloaded and a CPU will do. The
# second half does the same on a pipeline of Wan's kind.

# %%
import sys
from pathlib import Path

import torch

import cvg_kernels as cvg
from cvg_kernels import viz
from cvg_kernels.shapes import load_pipeline

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
# ## A pipeline and a prompt
#
# `pipe` is a stock `AnimateDiffPipeline` of diffusers, trained on clips of moving shapes.

# %%
pipe = load_pipeline()
prompt = "a red triangle moving right and a green square moving left"
settings = {"num_frames": 8, "num_inference_steps": 20, "guidance_scale": 3.0}  # what it was made for

# %% [markdown]
# ## Capture
#
# Name the words and run the pipeline inside the block. A word may have several tokens, and "triangles" would be found,
# too. Frames as tensors (`output_type="pt"`) are what the pictures below are made of.

# %%
with cvg.capture(pipe, words=["triangle", "square"]) as captured:
    frames = pipe(prompt, **settings, generator=torch.Generator().manual_seed(1), output_type="pt").frames[0]
print(captured)

# %% [markdown]
# ## Look
#
# `heat_map` averages over heads, layers and steps: one map for each frame of the latents. Bright is where the word was
# heard.

# %%
rows = {"the clip": frames}
for word in captured.words:
    heat = captured.heat_map(word)
    print(f"{word}: heat map {tuple(heat.shape)}, frames × rows × columns")
    rows[word] = viz.overlay(frames, heat)
show(viz.contact_sheet(rows), "shapes_words.png")

# %% [markdown]
# The average hides when a word was heard. `records` has every step and layer for itself; here is how much of the
# attention "triangle" got in the first and in the last step.

# %%
steps = sorted({record.step for record in captured.records})
place = captured.words.index("triangle")
for step in (steps[0], steps[-1]):
    maps = [r.maps[0, place] for r in captured.records if r.step == step and r.branch == "cond" and r.kind == "cross"]
    share = torch.stack([each.float().mean() for each in maps]).mean()
    print(f"step {step}: {len(maps)} layers, {share:.1%} of the attention")

# %% [markdown]
# The same as a page for the browser, which plays the clip and ranks the words under the mouse:

# %%
page = captured.write_viewer(OUT / "shapes_words.html", frames, prompt=prompt)
print(f"open {page.name} in a browser")

# %% [markdown]
# ## A pipeline of Wan's kind
#
# Wan's denoiser is a transformer that sees the whole video at once. With the real one, this is all:
#
#     pipe = diffusers.WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16)
#     pipe.to("cuda")
#
# So that this page runs anywhere, here is a Wan pipeline of two thin layers with random weights. It has never seen a
# video: it shows that the calls are the same, and its maps mean nothing.

# %%
import diffusers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors


def tiny_wan():
    """The parts that the real pipeline has, each as small as it may be."""
    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "cat", "dog", "and", "running"]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    encoder = transformers.T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=4)
    return diffusers.WanPipeline(
        tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=16, **names),
        text_encoder=transformers.T5EncoderModel(encoder).eval(),
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, text_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32
        ).eval(),
        vae=diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


wan = tiny_wan()
wan.set_progress_bar_config(disable=True)

# %%
size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3, "max_sequence_length": 16}
with cvg.capture(wan, words=["cat", "dog"]) as captured:
    frames = wan("a red cat and a blue dog", **size, output_type="pt").frames[0]
rows = {"the clip (random weights)": frames.float()}
for word in captured.words:
    heat = captured.heat_map(word)
    print(f"Wan, {word}: heat map {tuple(heat.shape)} for {len(frames)} frames")
    rows[word] = viz.overlay(frames.float(), heat)
show(viz.contact_sheet(rows), "wan_words.png")

# %% [markdown]
# Three maps for nine frames: Wan's autoencoder puts four frames into one of the latents. `overlay` shows each map on
# the frames nearest to it.
#
# Next: [which pipelines can be captured](../coverage.md), and [how to guide a video](guide_a_video.py) by these maps.
