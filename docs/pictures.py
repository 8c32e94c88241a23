"""Makes the pictures of the docs that `cvg-kernels generate` does not make: `python docs/pictures.py`.

What needs a model runs the shapes pipeline; curves are drawn from the figures in benchmarks/results.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from cvg_kernels.reference.path_flow import residual_hop

import cvg_kernels as cvg
from cvg_kernels import viz
from cvg_kernels.shapes.pipeline import load_pipeline, sample
from cvg_kernels.shapes.world import parse_caption, random_scene, render

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PROMPT = "a red circle moving left and a blue square moving right"


def flow_graph() -> None:
    """A token's graph on a real capture: of those with a cut inside, where exact flow and widest path differ most."""
    pipe = load_pipeline()
    with cvg.capture(pipe, words=["circle"], temporal=True, steps=[4]) as captured:
        sample(pipe, [PROMPT], [0])
    records = {r.layer: r for r in captured.records if r.branch == "cond" and r.grid[1] == 8}
    cross = next(r for r in reversed(records.values()) if r.kind == "cross")
    block, number = cross.layer.split(".attentions.")
    behind = f"{block}.motion_modules.{number[0]}."
    temporal = [r.maps for name, r in records.items() if name.startswith(behind)]
    maps = cross.maps.flatten(3)  # [1, 1, F, L]
    exact = cvg.subgraph_max_flow(maps, temporal, sink="frame")
    widest = cvg.path_flow(maps, temporal)
    inside = exact.cut[0, 0, ..., :-1, :].any((-1, -2)).mT  # [F, L]
    at = int(((exact.flow - widest)[0, 0] * inside).argmax())
    frame, place = divmod(at, maps.shape[3])
    flow, path = exact.flow[0, 0, frame, place], widest[0, 0, frame, place]
    print(f"flow {flow:.4f}, widest path {path:.4f}, frame {frame}, position {place}")
    viz.flow_graph(
        maps[0, 0, :, place],
        [residual_hop(hop[0, place], "average") for hop in temporal],
        exact.cut[0, 0, place, frame],
        DOCS / "flow_graph.png",
        token="circle",
        sink=frame,
    )


def gen1_curve() -> None:
    """Accuracy and consistency against the temporal scale."""
    guidance = json.loads((RESULTS / "shapes-gen1.json").read_text())["guidance"]
    by_scale = {1.0: guidance["none"]}
    for name, entry in guidance.items():
        if name.startswith("gen1:temporal_scale="):
            by_scale[float(name.partition("=")[2])] = entry
    scales = sorted(by_scale)
    curves = {
        kind: [by_scale[scale][kind] for scale in scales] for kind in ("present", "bound", "direction", "consistency")
    }
    viz.curve_with_intervals(scales, curves, DOCS / "gen1_curve.png", label="temporal_scale", stock=1.0)


def cvg_sweep() -> None:
    """What CVG's step size and number of guided steps do to accuracy and to image quality."""
    names = {"step_size": "step size η", "steps": "guided steps"}
    rows = []
    for kinds, top in (
        (("present", "bound", "direction", "all_right"), 1.02),
        (("object_distance", "encoder_frechet"), None),
    ):
        row = []
        for option, label in names.items():
            report = json.loads((RESULTS / f"shapes-cvg-{option}.json").read_text())
            entries = list(report["guidance"].values())
            curves = {kind: [entry[kind] for entry in entries] for kind in kinds}
            stock = getattr(cvg.CVG, option)
            row.append(viz.Panel(label, report["values"], curves, stock, top))
        rows.append(row)
    viz.panels_with_intervals(rows, DOCS / "cvg_sweep.png")


def vstar_maps() -> None:
    """Temporal maps of a clip of 24 frames without and with the band, mean over positions, layers and first steps."""
    pipe = load_pipeline()
    maps = {}
    for label, method in (
        ("untouched", cvg.VSTAR(sigma=None, trained_frames=8)),
        ("σ = 8", cvg.VSTAR(sigma=8.0, trained_frames=8)),
        ("σ = 1", cvg.VSTAR(sigma=1.0, trained_frames=8)),
    ):
        with method.attach(pipe), cvg.capture(pipe, temporal=True, steps=range(5)) as captured:
            sample(pipe, ["a red circle moving left"], [0], frames=24)
        each = [r.maps[0].mean(0) for r in captured.records if r.branch == "cond"]
        maps[label] = torch.stack(each).mean(0)
    viz.attention_maps(maps, DOCS / "vstar_maps.png")


def vstar_clip() -> None:
    """Every third frame of a clip of 24 frames from the model of 8, without and with states held one after the other.

    The seed is one at which both states show, as in two of five clips (benchmarks/results/shapes-vstar.json).
    """
    states = ["a red circle moving right", "a blue circle moving right"]
    pipe = load_pipeline()
    rows = {}
    for label, prompts in ((f"'{states[0]}'", None), (f"'{states[0]}', then '{states[1]}'", states)):
        with cvg.VSTAR(sigma=None, prompts=prompts, hold=2, trained_frames=8).attach(pipe):
            rows[label] = sample(pipe, [states[0]], [4], frames=24)[0][::3]
    viz.contact_sheet(rows).save(DOCS / "vstar_clip.png")


def gen1_tradeoff() -> None:
    """What an edit has of the content that was asked for and of the clip's structure, against the structure level."""
    report = json.loads((RESULTS / "shapes-edits.json").read_text())
    levels = report["groups"]["structure"]
    by_level = {n.partition("=")[2]: e for n, e in levels.items() if n.startswith("structure=")}
    entries = {"clip": report["input"], **by_level, "other": levels["structure of another clip"]}
    names = {"asked colour": "colour", "asked shape in it": "shape", "clip's direction": "direction"}
    curves = {name: [e[kind] for e in entries.values()] for name, kind in names.items()}
    distance = {"pixels from the clip's places": [e["distance"] for e in entries.values()]}
    label = "structure level (clip: untouched; other: the structure of another clip)"
    panels = [[viz.Panel(label, list(entries), curves)], [viz.Panel(label, list(entries), distance, top=None)]]
    viz.panels_with_intervals(panels, DOCS / "gen1_tradeoff.png")


def gen1_edit() -> None:
    """One clip, the structure that is kept of it at three levels, and what prompts and an image make of it.

    The clip and the seed are the first of their generators.
    """
    pipe = cvg.shapes.load_editor()
    rng = np.random.default_rng(0)
    clip = render([random_scene(rng, parse_caption("a red square moving right"))])[0]
    picture = render([random_scene(rng, parse_caption("a green triangle moving up"), frames=1)])
    rows = {"input": clip}
    for label, level, content in (
        ("'a blue circle', structure 0", 0, {"prompt": "a blue circle"}),
        ("'a blue circle', structure 3", 3, {"prompt": "a blue circle"}),
        ("an image of a green triangle, structure 4", 4, {"image": picture[0, 0]}),
    ):
        made = pipe(
            video=clip, structure=level, generator=torch.Generator().manual_seed(0), output_type="pt", **content
        )
        rows[f"structure {level}"] = made.structure[0][:, None].expand(-1, 3, -1, -1)
        rows[label] = made.frames[0]
    viz.contact_sheet(rows).save(DOCS / "gen1_edit.png")


if __name__ == "__main__":
    drawn = (flow_graph, gen1_curve, gen1_tradeoff, gen1_edit, cvg_sweep, vstar_maps, vstar_clip)
    for draw in drawn:
        try:
            draw()
        except FileNotFoundError as error:
            print(f"{draw.__name__}: {error}")
