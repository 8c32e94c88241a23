# %% [markdown]
# # Use the kernels in your own processor
#
# diffusers lets you replace how an attention layer computes: by an attention processor, a small object that is called
# in the layer's place. This page writes one around `attention_with_capture`, which returns the attention's output
# and, out of the same pass, the maps of chosen tokens. The attention matrix is never held.
#
# `cvg.capture` does all this for you, on many pipelines. Write a processor where you want something else.

# %%
import sys
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

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
# ## The kernel alone
#
# Queries of 256 places, keys and values of 16 tokens, 4 heads. `token_ids` are the tokens whose maps are wanted.

# %%
torch.manual_seed(0)
query, key, value = (torch.randn(1, 4, n, 32) for n in (256, 16, 16))
out, maps, lse = cvg.attention_with_capture(query, key, value, token_ids=[2, 5])
print("output", tuple(out.shape), "maps", tuple(maps.shape), "log-sum-exp", tuple(lse.shape))

# %% [markdown]
# The output is that of PyTorch's attention, and the maps are columns of softmax(q kᵀ / √d), averaged over heads:

# %%
matrix = (query @ key.mT / 32**0.5).softmax(-1)
print(f"output differs by {float((out - scaled_dot_product_attention(query, key, value)).abs().max()):.0e}")
print(f"maps differ by {float((maps - matrix[..., [2, 5]].mean(1).mT).abs().max()):.0e}")

# %% [markdown]
# ## A processor
#
# What a cross-attention layer of a UNet does, with one call exchanged. Wherever it runs, the fastest kernel there is
# for this machine is chosen.


# %%
class MapProcessor:
    """Cross-attention that remembers where chosen tokens were heard."""

    def __init__(self, token_ids):
        self.token_ids = token_ids
        self.maps = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **others):
        """Computes a layer, as diffusers asks for it."""

        def by_head(tensor):
            return tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B, heads, N, d]

        query = by_head(attn.to_q(hidden_states))
        key, value = by_head(attn.to_k(encoder_hidden_states)), by_head(attn.to_v(encoder_hidden_states))
        out, maps, _ = cvg.attention_with_capture(query, key, value, self.token_ids, scale=attn.scale)
        self.maps.append(maps)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


# %% [markdown]
# ## Into a pipeline
#
# Which tokens are the words? The tokenizer says. `cvg.capture` finds words of several tokens, plurals and accents;
# here each word is one token.

# %%
pipe = load_pipeline()
prompt = "a red triangle moving right and a green square moving left"
tokens = pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer(prompt).input_ids)
words = ["triangle", "square"]
token_ids = [
    next(at for at, token in enumerate(tokens) if token.strip("Ġ▁").removesuffix("</w>") == word) for word in words
]
print("tokens", dict(zip(words, token_ids, strict=True)))

# %%
settings = {"num_frames": 8, "num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "pt"}
stock = pipe(prompt, **settings, generator=torch.Generator().manual_seed(1)).frames[0]

before = pipe.unet.attn_processors
ours = MapProcessor(token_ids)
to_text = [name for name in before if ".attentions." in name and ".attn2." in name]  # the layers that see the text
pipe.unet.set_attn_processor({name: ours if name in to_text else one for name, one in before.items()})
frames = pipe(prompt, **settings, generator=torch.Generator().manual_seed(1)).frames[0]
pipe.unet.set_attn_processor(before)

print(f"{len(to_text)} layers, {len(ours.maps)} maps; the clip differs by {float((frames - stock).abs().max()):.0e}")

# %% [markdown]
# ## The maps
#
# Every call left maps `[branches · frames, tokens, places]`; the second branch is the one with the prompt. The largest
# grid is shown, averaged over layers and steps.

# %%
places = max(maps.shape[-1] for maps in ours.maps)
largest = torch.stack([maps for maps in ours.maps if maps.shape[-1] == places]).mean(0)
side = round(places**0.5)
heat = largest.unflatten(0, (2, -1))[1].unflatten(-1, (side, side))  # [F, K, h, w]
rows = {"the clip": frames} | {word: viz.overlay(frames, heat[:, at]) for at, word in enumerate(words)}
show(viz.contact_sheet(rows), "own_processor.png")

# %% [markdown]
# The same numbers as those of `cvg.capture`, for the layers of that grid:

# %%
with cvg.capture(pipe, words=words) as captured:
    pipe(prompt, **settings, generator=torch.Generator().manual_seed(1))
theirs = [r.maps[0] for r in captured.records if r.branch == "cond" and r.kind == "cross" and r.grid[1] == side]
theirs = torch.stack([maps.float() for maps in theirs]).mean(0).transpose(0, 1)  # [F, K, h, w]
print(f"capture's maps differ by {float((heat - theirs).abs().max()):.0e}")

# %% [markdown]
# The maps are differentiable together with the output: a loss on them can move latents, or train a network.
# Other operations, and what each backend can do: [Kernels](../kernels.md).
