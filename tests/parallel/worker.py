"""One of two processes that run a video together; says how far everything is from what a process alone gives.

Started by test_context_parallel.py: `python -m tests.parallel.worker RANK FOLDER SEED CASE…`.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist

import cvg_kernels as cvg
from cvg_kernels.guidance import Guidance
from cvg_kernels.pipeline.layer_capture import LayerCapture
from cvg_kernels.pipeline.layers import attention_layers
from cvg_kernels.pipeline.parallel import whole_maps
from tests.parallel import ring_on_cpu
from tests.pipelines import PIPELINES, run

WORDS = ["cat", "blue dog"]
FORMS: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses_degree": 2},
    "ulysses_anything": {"ulysses_degree": 2, "ulysses_anything": True},
    "ring": {"ring_degree": 2},
    "ring_anything": {"ring_degree": 2, "ring_anything": True},
}
#: Pipeline, form, and what is done with it; of a timestep for each token, what differs.
CASES = [
    *(
        ("wan", form, way)
        for form in ("ulysses", "ring")
        for way in ("stock", "capture", "capture_heads", "swap", "vico", "gradients", "vstar", "vico_and_vstar")
    ),
    *(("wan", f"{form}_anything", way) for form in ("ulysses", "ring") for way in ("capture", "vico")),
    *(("wan22_ti2v", "ulysses", way) for way in ("capture", "vico")),
    *(("chronoedit", "ulysses", way) for way in ("capture", "vico")),
    # whose text is spread too, and whose heads meet at each layer; diffusers alone cannot do this with its mask
    *(("ltx", "ulysses", way) for way in ("capture", "capture_heads", "vico")),
    ("ltx", "ring", "capture"),
    ("helios", "ulysses", "vico"),
]


class Gradients(Guidance):
    """Leaves the latents alone and notes the gradients of a loss of the maps, and of one of the prediction."""

    def before_step(self, call, run):
        names = [layer.name for layer in attention_layers(call.denoiser) if layer.kind == "cross"]
        ids = torch.tensor([[2, 5]] * len(call.latents))
        z = call.latents.detach().requires_grad_()
        with LayerCapture(call.denoiser, ids, names, head_reduction="none") as layers:
            maps = layers.run(lambda: call.denoise(z))
            loss = sum((one * one.roll(1, -1)).sum() for one in maps.values())
            (of_maps,) = torch.autograd.grad(loss, z)
        z = call.latents.detach().requires_grad_()
        prediction = call.denoise(z)[0]
        (of_prediction,) = torch.autograd.grad((prediction * prediction.roll(1, -1)).sum(), z)
        run.history.append({"maps": of_maps, "prediction": of_prediction})
        return call.latents


def captured(pipe, options, **how):
    with cvg.capture(pipe, words=WORDS, **how) as found:
        frames = run(pipe, options)
    return [frames, *(record.maps for record in found.records)]


def guided(method):
    def give(pipe, options):
        with method.attach(pipe) as made:
            frames = run(pipe, options)
        keys = ("loss", "gradient_norm", "maps", "prediction")
        return [frames, *(entry[key] for entry in made.history for key in keys if key in entry)]

    return give


def swapped(pipe, options):
    with cvg.processors(pipe, backend="reference"):
        return [run(pipe, options)]


VICO = cvg.Vico(words=WORDS, iterations=2, stop=1.0, flow="cross")
WAYS: dict[str, Callable[..., list[torch.Tensor]]] = {
    "stock": lambda pipe, options: [run(pipe, options)],
    "capture": captured,
    "capture_heads": lambda pipe, options: captured(pipe, options, head_reduction="none"),
    "swap": swapped,
    "vico": guided(VICO),
    "gradients": guided(Gradients()),
    "vstar": guided(cvg.VSTAR(sigma=1.0, stop=1.0)),
    "vico_and_vstar": guided(cvg.Together((VICO, cvg.VSTAR(sigma=1.0, stop=1.0)))),
}


def spread(name: str, form: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline whose transformer runs on both processes."""
    pipe, options = PIPELINES[name].build()
    config = FORMS[form]
    ring = "ring_degree" in config
    pipe.transformer.set_attention_backend("_native_flash" if ring else "native")
    pipe.transformer.enable_parallelism(
        config=diffusers.ContextParallelConfig(**config), cp_plan=_plan(pipe.transformer)
    )
    return pipe, options


def _plan(transformer: torch.nn.Module) -> dict[str, Any] | None:
    """The class' own plan; that of Helios names the 40 blocks of the real model."""
    own, blocks = transformer._cp_plan, len(getattr(transformer, "blocks", ()))
    return {
        name: what
        for name, what in own.items()
        if not (place := re.match(r"blocks\.(\d+)", name)) or int(place[1]) < blocks
    }


def shares() -> dict[str, float]:
    """Maps of 27 queries and 4 heads, cut as the forms cut them, put together again;
    and the gradients of each share.
    """
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(torch.initial_seed())
    whole = torch.rand(2, 4, 3, 27, generator=generator, dtype=torch.float64)
    weights = torch.rand(whole.shape, generator=generator, dtype=torch.float64)
    network = torch.nn.Module()
    config = diffusers.ContextParallelConfig(ulysses_degree=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
    config.setup(rank, 2, torch.device("cpu"), mesh)
    network._parallel_config = diffusers.ParallelConfig(context_parallel_config=config)
    layer = torch.nn.Module()
    layer.heads = 4
    found = {}
    queries = slice(0, 14) if rank == 0 else slice(14, 27)
    heads = slice(2 * rank, 2 * rank + 2)
    for name, given, want, own in (
        ("queries", whole[..., queries], whole, weights[..., queries]),
        ("queries_mean", whole.mean(1)[..., queries], whole.mean(1), weights.mean(1)[..., queries]),
        ("heads", whole[:, heads], whole, weights[:, heads]),
        # a head of the mean counts a half within its share, as the mean of the shares does
        ("heads_mean", whole[:, heads].mean(1), whole.mean(1), weights.mean(1) / 2),
    ):
        part = given.clone().requires_grad_()
        mine = 2 if name.startswith("heads") else 4
        got = whole_maps(part, network, layer, mine, 27)
        (gradient,) = torch.autograd.grad((got * (weights if want.ndim == 4 else weights.mean(1))).sum(), part)
        found[name] = max(float((got - want).abs().max()), float((gradient - own).abs().max()))
    return found


def queries(pipe: Any) -> list[int]:
    """Notes how many tokens ask the text in each layer from now on."""
    seen: list[int] = []
    for name, module in pipe.transformer.named_modules():
        if name.endswith("attn2.to_q"):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    return seen


def distance(got: list[torch.Tensor], want: list[torch.Tensor]) -> dict[str, Any]:
    """The largest difference, relative to the largest number of each."""
    assert [one.shape for one in got] == [one.shape for one in want]
    return {
        "count": len(got),
        "error": max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True)),
    }


def main(rank: int, folder: Path, seed: int, asked: list[str]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    torch.accelerator.device_count = lambda: 2  # diffusers counts GPUs
    ring_on_cpu.install()
    found: dict[str, Any] = {"shares": shares()}
    for name, form, way in (case for case in CASES if "-".join(case) in asked):
        pipe, options = spread(name, form)
        alone, own = PIPELINES[name].build()
        case = found["-".join((name, form, way))] = {}
        tokens, all_tokens = queries(pipe), queries(alone)
        try:
            got = WAYS[way](pipe, options)
            case |= distance(got, WAYS[way](alone, own))
        except cvg.ArgumentError as error:
            case["refused"] = str(error)
        except Exception:
            case["failed"] = traceback.format_exc()
        case["share"] = [sum(tokens) * 2, sum(all_tokens)]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
