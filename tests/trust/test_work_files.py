"""Tables, results, prompts, manifests: each may come from anywhere, or be half of one."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("fcntl")

from cvg_kernels import auto  # noqa: E402
from cvg_kernels.cli import main  # noqa: E402
from cvg_kernels.generate import Job  # noqa: E402
from cvg_kernels.kernels import Backend  # noqa: E402
from cvg_kernels.prompt_file import read_prompts  # noqa: E402
from cvg_kernels.worklist import Worklist  # noqa: E402
from tests.trust.files import BAD_JSON, refused, saved_by_torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


# --- tables of backends, results -------------------------------------------------------------------------------------

RULE = {"operation": "attention", "when": {}, "order": ["stock"]}
TABLES = [
    {"made": 3},
    {"made": {"cpu": 4}},
    {"tables": []},
    {"tables": {"cpu": 3}},
    {"tables": {"cpu": [3]}},
    {"tables": {"cpu": [RULE | {"when": []}]}},
    {"tables": {"cpu": [RULE | {"when": {"bits": [1]}}]}},
    {"tables": {"cpu": [RULE | {"when": {"bits": {}}}]}},
    {"tables": {"cpu": [RULE | {"when": {"evil": 1}}]}},
    {"tables": {"cpu": [RULE | {"order": 5}]}},
    {"tables": {"cpu": [RULE | {"order": [["stock"]]}]}},
    {"tables": {"cpu": [RULE | {"operation": 5}]}},
    {"tables": {"cpu": [RULE | {"operation": "../x"}]}},
]


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv(auto.FOLDER_VARIABLE, str(tmp_path / "tables"))
    path = auto.user_path(torch.device("cpu"))
    auto.write(path, {"cpu": [auto.Rule("attention", {}, (Backend.STOCK,))]}, {"cpu": "today"})
    return path


@pytest.mark.parametrize("change", TABLES, ids=str)
def test_a_table_of_another_kind_is_ignored_with_the_reason(change, table):
    table.write_text(json.dumps(json.loads(table.read_text()) | change))
    with pytest.warns(RuntimeWarning, match="is ignored: ") as said:
        assert auto.users(torch.device("cpu")) is None
    assert str(table) in str(said[0].message)
    assert "is ignored" in auto.why_no_users(torch.device("cpu"))


@pytest.mark.parametrize("name", [*BAD_JSON, "pickle"])
def test_a_table_that_is_none_is_ignored_with_the_reason(name, table, tmp_path):
    if name == "pickle":
        saved_by_torch(table, tmp_path / "mark")
    else:
        table.write_bytes(BAD_JSON[name][0])
    with pytest.warns(RuntimeWarning, match="is ignored: "):
        assert auto.users(torch.device("cpu")) is None
    assert not (tmp_path / "mark").exists()


CHOICE = {"operation": "attention", "when": {}, "order": ["stock", "native"]}
RESULTS = [
    b'{"tune": 3}',
    b'{"tune": {"measured": []}}',
    b'{"architecture": "cpu", "choices": []}',
    *(
        json.dumps({"architecture": "cpu", "device_name": "x", "choices": one}).encode()
        for one in (
            3,
            [3],
            [{}],
            ["x"],
            [None],
            [CHOICE | {"operation": 5}],
            [CHOICE | {"operation": "fly"}],
            [CHOICE | {"when": 3}],
            [CHOICE | {"when": {"bits": [1]}}],
            [CHOICE | {"order": 3}],
            [CHOICE | {"order": ["x"]}],
            [CHOICE | {"order": [{}]}],
        )
    ),
    b'{"architecture": 3, "device_name": "x", "choices": []}',
]


@pytest.mark.parametrize("data", [*RESULTS, *(data for data, _ in BAD_JSON.values()), b"pickle"])
def test_results_that_are_none(data, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    path.write_bytes(data)
    if data == b"pickle":
        saved_by_torch(path, tmp_path / "mark")
    monkeypatch.setattr(auto, "_SHIPPED", tmp_path / "auto.json")
    auto.write(auto._SHIPPED, {"any cpu": [], "any gpu": []}, {})
    auto.shipped.cache_clear()
    before = auto._SHIPPED.read_bytes()
    try:
        assert main(["tune", "--from-results", str(path)]) == 2
    finally:
        auto.shipped.cache_clear()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("cvg-kernels tune: ")
    assert auto._SHIPPED.read_bytes() == before and not (tmp_path / "mark").exists()


# --- prompts, manifests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_line_of_prompts_that_is_none(name, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a cat"}\n' + BAD_JSON[name][0] + b"\n")
    if name == "empty":
        assert len(read_prompts(path, Job("", tmp_path / "out"))) == 1
    else:
        refused(lambda: read_prompts(path, Job("", tmp_path / "out")), path)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a", "prompt": "b"}',
        '{"prompt": "a", "guidance_scale": NaN}',
        '{"prompt": "\\udc00"}',
        '{"prompt": "a", "guidance_scale": 1e400}',
        '{"prompt": "a", "output": "/etc"}',
        '{"prompt": "a", "device": "x"}',
        '{"prompt": ["a"]}',
        '{"prompt": "a", "words": [["a", "b"]]}',
        '{"prompt": "a", "words": [{}]}',
        '{"prompt": "a", "seed": 1.5}',
        '{"prompt": "a", "seed": true}',
        '{"prompt": "a", "steps": 99999999999999999999}',
    ],
)
def test_settings_of_a_prompt_that_are_none(line, tmp_path):
    (tmp_path / "p.jsonl").write_text(line)
    refused(lambda: read_prompts(tmp_path / "p.jsonl", Job("", tmp_path / "out")), "line 1")


def test_a_pickle_is_no_list_of_prompts(tmp_path):
    saved_by_torch(tmp_path / "p.txt", tmp_path / "mark")
    refused(lambda: read_prompts(tmp_path / "p.txt", Job("", tmp_path)), tmp_path / "p.txt", "UTF-8")
    assert not (tmp_path / "mark").exists()


def test_results_stay_in_the_output_folder(tmp_path):
    """Whatever the prompts are."""
    bad = ["../../etc/passwd", "/etc/passwd", "..", ".", "a/../../b", "con\0", "~root", "x" * 5000, "💣" * 300]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": one}) for one in bad))
    for item in read_prompts(tmp_path / "p.jsonl", Job("", tmp_path / "out")):
        assert item.job.output.resolve().parent == (tmp_path / "out").resolve()
        assert 12 <= len(item.job.output.name.encode()) < 255
        item.job.output.mkdir(parents=True)


def test_a_line_ends_where_files_end_lines(tmp_path):
    """JSON and prompts may hold other characters that end lines of text."""
    text = "a\u2028b\u0085c\x0bd"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n\n", "utf-8-sig")
    (item,) = read_prompts(tmp_path / "p.jsonl", Job("", tmp_path / "out"))
    assert item.job.prompt == text and item.line == 1


@pytest.mark.parametrize("seed, good", [(2**64 - 1, True), (-(2**63), True), (2**64, False), (-(2**63) - 1, False)])
def test_seeds_fit_the_generator(seed, good, tmp_path):
    job = Job("a red circle moving left", tmp_path / "out", seed=seed)
    if good:
        job.check()
        torch.Generator().manual_seed(job.seed)
    else:
        refused(job.check, "--seed must fit 64 bits")


def test_lines_of_a_manifest_that_are_none_are_left_aside(tmp_path, caplog):
    key = "abcdef012345"
    bad = [data.replace(b"\n", b" ") for data, _ in BAD_JSON.values()]
    bad += [b'{"key": []}', b'{"key": "x"}', b"null", b'"x"', b"\xff"]
    (tmp_path / "manifest.jsonl").write_bytes(
        b"\n".join([*bad, json.dumps({"key": key, "status": "done"}).encode(), b'{"key": "half'])
    )
    work = Worklist(tmp_path)
    try:
        assert work.finished(key) and not work.finished("0" * 12)
        work.record({"key": "0" * 12, "status": "failed"})
        assert work.finished("0" * 12)
    finally:
        work.close()
    assert "has a line that is none" in caplog.text
