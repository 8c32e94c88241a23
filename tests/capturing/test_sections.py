"""Videos that one call of a pipeline makes part by part: whose maps are whose."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from tests.pipelines import PIPELINES, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize(
    ("name", "changes", "sections"),
    [
        ("framepack", {"num_frames": 33, "num_inference_steps": 1}, 4),
        ("helios", {"num_frames": 66}, 2),
        ("animatediff_freeinit", {}, 2),
        ("wan22", {}, 1),
    ],
)
def test_each_section_has_its_own_maps(name, changes, sections):
    pipe, options = PIPELINES[name].build()
    with cvg.capture(pipe, words=["cat"]) as captured:
        run(pipe, {**options, **changes})
    found = [record.section for record in captured.records]
    assert found == sorted(found) and set(found) == set(range(sections))
    maps = [captured.heat_map("cat", section=number) for number in range(sections)]
    assert all(not torch.equal(one, maps[0]) for one in maps[1:])
    if sections > 1:
        with pytest.warns(cvg.GuidanceWarning, match=f"through its schedule {sections} times"):
            assert torch.equal(captured.heat_map("cat"), maps[-1])
    else:
        assert torch.equal(captured.heat_map("cat"), maps[0])
    with pytest.raises(cvg.ArgumentError, match=f"one of the {sections} captured sections, got 9"):
        captured.heat_map("cat", section=9)


def test_nothing_recorded_is_said():
    pipe, _ = PIPELINES["wan"].build()
    captured = cvg.capture(pipe, words=["cat"])
    with pytest.raises(cvg.ArgumentError, match="nothing was recorded"):
        captured.heat_map("cat")
