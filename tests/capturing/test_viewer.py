"""The page of captured maps: what it holds, what is thinned out of it,
and that a browser's engine reads it as meant.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import cvg_kernels as cvg
from cvg_kernels.capturing import viewer
from cvg_kernels.capturing.viewer import ALL_LAYERS, ALL_STEPS, write_viewer
from tests.capturing.records import Captured


def read(path) -> dict:
    """What a page holds."""
    text = path.read_text()
    assert text.count("</script>") == 2  # a word that is one does not end it
    return json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.S)[1])


def maps_of(clip: dict, step: str, layer: str) -> np.ndarray:
    (group,) = [one for one in clip["groups"] if (one["step"], one["layer"]) == (step, layer)]
    values = np.frombuffer(base64.b64decode(clip["maps"]), np.uint8)
    shape = (len(clip["words"]), *group["grid"])
    part = values[group["offset"] : group["offset"] + np.prod(shape)].reshape(shape)
    return part / 255 * group["scale"]


def test_what_the_page_holds(tmp_path):
    captured, frames = Captured(), torch.rand(5, 3, 10, 12)
    page = read(write_viewer(tmp_path / "maps.html", {"one": (frames, captured)}, prompt="a <cat>"))
    (clip,) = page["clips"]
    assert (page["prompt"], clip["name"], clip["words"]) == ("a <cat>", "one", ["cat", "</script>"])
    strip = Image.open(io.BytesIO(base64.b64decode(clip["pictures"].split(",")[1])))
    rows = torch.from_numpy(np.array(strip)).unflatten(0, (5, 10)).permute(0, 3, 1, 2)
    assert torch.equal(rows, (frames * 255).round().byte())
    for record in captured.records:
        found = maps_of(clip, str(record.step), record.layer)
        wanted = record.maps[0].numpy()
        assert np.abs(found - wanted).max() <= wanted.max() / 255 / 2 + 1e-6
    fine = [record.maps[0] for record in captured.records if record.layer == "fine"]
    np.testing.assert_allclose(maps_of(clip, ALL_STEPS, "fine"), torch.stack(fine).mean(0), atol=0.003)
    assert maps_of(clip, ALL_STEPS, ALL_LAYERS).shape == (2, 3, 6, 7)
    assert (clip["groups"][0]["step"], clip["groups"][0]["layer"]) == (ALL_STEPS, ALL_LAYERS)
    assert "To keep the page small" not in page["note"]


def test_the_mean_of_layers_counts_each_alike(tmp_path):
    captured = Captured()
    for record in captured.records:
        record.maps.fill_(0.2 if record.layer == "fine" else 0.6)
    (clip,) = read(write_viewer(tmp_path / "m.html", {"one": (torch.rand(3, 3, 8, 8), captured)}))["clips"]
    np.testing.assert_allclose(maps_of(clip, "1", ALL_LAYERS), 0.4, atol=1e-6)


def test_a_large_page_is_thinned_and_says_so(tmp_path, monkeypatch):
    captured, sizes = Captured(frames=4, cells=40, steps=12), []
    for most in (10**9, 300_000, 130_000, 50_000, 1):
        monkeypatch.setattr(viewer, "_MOST_BYTES", most)
        page = read(write_viewer(tmp_path / "m.html", {"one": (torch.rand(4, 3, 8, 8), captured)}))
        sizes.append(len(page["clips"][0]["maps"]) * 3 // 4)
        assert ("To keep the page small" in page["note"]) == (most < 10**9)
        assert sizes[-1] <= most or most == 1
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 50
    assert "16 cells a side" in page["note"] and "mean of the layers alone" in page["note"]


def test_frames_are_taken_as_pipelines_give_them(tmp_path):
    """A tensor, an array and PIL images of one clip make one page."""
    pixels = np.random.default_rng().integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    array = pixels.astype(np.float32) / 255
    forms = (torch.from_numpy(array).movedim(3, 1), array, [Image.fromarray(each) for each in pixels])
    captured = Captured()
    pages = [read(write_viewer(tmp_path / "m.html", {"a": (frames, captured)})) for frames in forms]
    assert pages[0] == pages[1] == pages[2]


def test_what_cannot_be_shown_is_named(tmp_path):
    frames = torch.rand(3, 3, 8, 8)
    with pytest.raises(cvg.ArgumentError, match="at least one clip"):
        write_viewer(tmp_path / "m.html", {})
    with pytest.raises(
        cvg.ArgumentError, match=r"clips\['a'\] must have the frames of one video: .*, got \(3, 8, 8\)"
    ):
        write_viewer(tmp_path / "m.html", {"a": (frames[0], Captured())})
    with pytest.raises(cvg.ArgumentError, match="must have captured maps of words, got none"):
        write_viewer(tmp_path / "m.html", {"a": (frames, Captured(branch="uncond"))})
    assert not list(tmp_path.iterdir())


#: Enough of a browser for the page's script: elements that keep what is put into them, a canvas that notes what is
#: drawn.
BROWSER = """
const made = {}, drawn = [];
class Element {
  constructor() { this.children = []; this.style = {}; this.dataset = {}; this.heard = {}; this.value = ""; }
  append(...more) { this.children.push(...more); }
  replaceChildren(...more) { this.children = more; if (more.length && more[0].choice) this.value = more[0].value; }
  addEventListener(name, call) { this.heard[name] = call; }
  getBoundingClientRect() { return { left: 0, top: 0, width: 100, height: 100 }; }
  getContext() { return { drawImage: (...a) => drawn.push(a), putImageData: (p) => drawn.push(p) }; }
}
globalThis.Option = class { constructor(text) { this.choice = true; this.value = text; } };
globalThis.ImageData = class {
  constructor(w, h) { this.width = w; this.height = h; this.data = new Uint8ClampedArray(4 * w * h); }
};
globalThis.Image = class { set src(text) { this.text = text; setTimeout(() => this.onload()); } };
globalThis.document = {
  body: new Element(),
  getElementById: (id) => made[id] ??= new Element(),
  createElement: () => new Element(),
};
globalThis.setInterval = () => {};
"""
ASKED = """
setTimeout(() => {
  made.word.value = "cat";
  const box = made.clips.children[0], canvas = box.children[1];
  canvas.heard.mousemove({ clientX: 99, clientY: 1 });
  made.frame.heard.input({ target: { value: "1" } });
  const ranked = box.children[2].children.map(line => [line.children[0].textContent, line.children[2].textContent]);
  console.log(JSON.stringify({ ready: document.body.dataset.ready, ranked, steps: made.step.children.map(o => o.value),
    layers: made.layer.children.map(o => o.value), words: made.word.children.map(o => o.value), drawn: drawn.length
        }));
}, 50);
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_the_script_ranks_the_words_under_the_mouse(tmp_path):
    captured = Captured(frames=2)
    (top,) = [one for one in captured.records if one.step == 1 and one.layer == "fine"]
    for record in captured.records:
        record.maps.zero_()
        record.maps[0, 0, 0], record.maps[0, 1, 0] = 0.3, 0.1
        record.maps[0, 0, 1], record.maps[0, 1, 1] = 0.05, 0.4  # the frame that is chosen
    top.maps[0, 0, 1, 0, -1] = 0.2
    path = write_viewer(tmp_path / "m.html", {"one": (torch.rand(2, 3, 8, 8), captured)})
    text = path.read_text()
    data = re.search(r'type="application/json">(.*?)</script>', text, re.S)[1]
    script = re.findall(r"<script>(.*?)</script>", text, re.S)[0]
    program = tmp_path / "page.js"
    held = f"document.getElementById('data').textContent = {json.dumps(data)};"
    program.write_text(f"{BROWSER}\n{held}\n{script}\n{ASKED}")
    done = subprocess.run(["node", str(program)], capture_output=True, text=True, timeout=600, check=True)
    told = json.loads(done.stdout)
    assert told["ready"] == "yes" and told["drawn"] > 0
    assert told["words"] == ["none", "cat", "</script>"]
    assert told["steps"] == [ALL_STEPS, "0", "1"] and told["layers"] == [ALL_LAYERS, "fine", "coarse"]
    assert [name for name, _ in told["ranked"]] == ["</script>", "cat"]
    assert told["ranked"][0][1] == "40.0 %"
