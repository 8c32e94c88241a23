"""The tables behind `auto`: the user's own, files that are none, and `cvg-kernels tune`."""

from __future__ import annotations

import json

import pytest
import torch

import cvg_kernels as cvg
from cvg_kernels import auto
from cvg_kernels.bench import harness, tuning, tuning_cases
from cvg_kernels.cli import main
from cvg_kernels.kernels import Backend, Facts
from cvg_kernels.ops import _choice
from cvg_kernels.ops._choice import kernel_for

CPU = torch.device("cpu")
LONG = Facts(CPU, torch.float32, keys=2000, head_dim=64, value_dim=64)


@pytest.fixture(autouse=True)
def plain_processor(monkeypatch):
    """The tests' machine is a CPU of no special kind."""
    monkeypatch.setattr(auto, "_cpu_flags", lambda: ["fma", "avx2"])


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder for the user's tables, on a machine where every backend is there."""
    monkeypatch.setenv(auto.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(_choice, "unavailable_reason", lambda *call: None)
    monkeypatch.setattr(tuning, "why_not", lambda *call: None)
    return tmp_path


def put(rules: list[auto.Rule], name: str = "cpu"):
    path = auto.user_path(CPU)
    auto.write(path, {name: rules}, {name: "by a test"})
    return path


def test_the_users_table_goes_first(folder):
    put([auto.Rule("attention", {"keys": "long"}, (Backend.STOCK, Backend.NATIVE))])
    assert kernel_for("attention", "auto", LONG).backend is Backend.STOCK
    # What it does not hold is the shipped table's.
    by_shipped = (Backend.NATIVE, Backend.STOCK, Backend.REFERENCE)
    assert auto.order("attention", LONG._replace(keys=5)) == by_shipped
    assert auto.order("attention_backward", LONG) == by_shipped


def test_processors_with_units_for_bfloat16_have_rules_of_their_own(folder, monkeypatch):
    facts = LONG._replace(dtype=torch.bfloat16)
    assert auto.order("attention", facts)[0] is Backend.NATIVE
    monkeypatch.setattr(auto, "_cpu_flags", lambda: ["fma", "amx_bf16", "amx_tile"])
    _choice.forget_choices()
    assert auto.architecture(CPU) == "cpu_amx"
    assert auto.order("attention", facts)[0] is Backend.STOCK
    assert auto.order("attention", facts._replace(dtype=torch.float16))[0] is Backend.NATIVE


def test_it_is_read_once(folder):
    assert kernel_for("attention", "auto", LONG).backend is Backend.NATIVE
    put([auto.Rule("attention", {}, (Backend.STOCK,))])
    assert kernel_for("attention", "auto", LONG._replace(batch=3)).backend is Backend.NATIVE
    _choice.forget_choices()
    assert kernel_for("attention", "auto", LONG).backend is Backend.STOCK


def _changed(**change):
    return lambda text: json.dumps(json.loads(text) | change)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda text: text[:40], "Expecting|delimiter|Unterminated"),
        (lambda text: "[]", "not as `tune` writes it"),
        (lambda text: "\x00", "Expecting value"),
        (_changed(format=0), "its format is 0, this version reads 1"),
        (_changed(version="0.0.1"), "cvg_kernels 0.0.1 wrote it"),
        (_changed(tables={"cpu": [{"operation": "fly", "when": {}, "order": []}]}), "no operation 'fly'"),
        (_changed(tables={"cpu": [{"operation": "attention", "when": {}, "order": ["cuda"]}]}), "no cuda kernel"),
        (_changed(tables={"cpu": [{"operation": "attention", "when": {}, "order": ["x"]}]}), "'x' is not a valid"),
        (_changed(tables={"cpu": [{"operation": "attention"}]}), "KeyError"),
    ],
)
def test_a_file_that_is_no_table_is_ignored_with_a_warning(spoil, why, folder):
    path = put([auto.Rule("attention", {}, (Backend.STOCK,))])
    path.write_text(spoil(path.read_text()))
    with pytest.warns(RuntimeWarning, match=why) as said:
        assert kernel_for("attention", "auto", LONG).backend is Backend.NATIVE
        assert kernel_for("attention", "auto", LONG._replace(batch=2)).backend is Backend.NATIVE
    assert len(said) == 1 and str(path) in str(said[0].message)


def test_where_the_users_table_lies(monkeypatch, tmp_path):
    monkeypatch.delenv(auto.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = auto.user_path(CPU)
    assert path.parent == tmp_path / "cvg_kernels"
    assert path.name.startswith("auto-cpu-") and path.suffix == ".json"
    monkeypatch.setenv(auto.FOLDER_VARIABLE, str(tmp_path / "mine"))
    assert auto.user_path(CPU).parent == tmp_path / "mine"


def test_a_table_is_written_whole_or_not_at_all(folder, monkeypatch):
    path = put([auto.Rule("attention", {}, (Backend.STOCK,))])
    before = path.read_text()
    monkeypatch.setattr(auto.os, "replace", lambda *names: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        put([])
    assert path.read_text() == before and list(folder.iterdir()) == [path]


def test_the_shipped_table_is_as_it_would_be_written(tmp_path):
    shipped = auto.shipped()
    auto.write(tmp_path / "again.json", shipped.rules, shipped.made)
    assert (tmp_path / "again.json").read_text() == shipped.path.read_text()


# --- tune ------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that a call says it took."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeCase:
    """Attention where `stock` and `native` take as long as they are told, and may be wrong."""

    operation, dtype = "attention", torch.float32

    def __init__(self, clock, seconds, wrong=(), keys=2000, broken=()) -> None:
        self.clock, self.seconds, self.wrong, self.broken = clock, seconds, wrong, broken
        self.keys, self.timed = keys, []

    def facts(self, device):
        return Facts(device, self.dtype, keys=self.keys, head_dim=64, value_dim=64)

    def sizes(self):
        return {"keys": self.keys}

    def ready(self, device, *, small):
        def by(backend):
            if backend.value in self.broken:
                raise RuntimeError("no kernel image")
            if not small:
                self.timed.append(backend.value)
            self.clock.now += self.seconds[backend.value]
            return [torch.ones(3) + (0.1 if backend.value in self.wrong else 0), None]

        return tuning_cases.Run(by, lambda: [torch.ones(3, dtype=torch.float64), None])


@pytest.fixture
def tuned(folder, monkeypatch):
    """Runs `tune` on fake cases; what they take is what the fake clock says."""
    clock = Clock()
    monkeypatch.setattr(harness.time, "perf_counter", clock)

    def run(*cases, options=()):
        made = [FakeCase(clock, **case) for case in cases]
        monkeypatch.setattr(tuning_cases, "cases", lambda *given, **more: made)
        assert main(["tune", "--device", "cpu", "--rounds", "3", *options]) == 0
        return made

    return run


def test_tune_writes_what_it_measured(tuned, folder, capsys):
    (case,) = tuned({"seconds": {"native": 2.0, "stock": 1.0}})
    assert case.timed == 5 * ["stock", "native"] or case.timed == 5 * ["native", "stock"]
    path = auto.user_path(CPU)
    table = auto.read(path, written_by=cvg.__version__)
    (rule,) = table.rules["cpu"]
    assert rule.operation == "attention" and rule.order == (Backend.STOCK, Backend.NATIVE)
    assert rule.when == {
        "bits": 32,
        "dtype": "float32",
        "keys": "long",
        "head_dim": 64,
        "masked": False,
        "band": False,
    }
    assert "cvg-kernels tune" in table.made["cpu"]
    assert kernel_for("attention", "auto", LONG).backend is Backend.STOCK
    said = capsys.readouterr().out
    assert "2000.000 ms" in said and "1000.000 ms  ← first" in said and f"wrote {path}" in said


def test_a_wrong_kernel_is_never_chosen(tuned, capsys):
    (case,) = tuned({"seconds": {"native": 2.0, "stock": 1.0}, "wrong": ["stock"]})
    assert set(case.timed) == {"native"}
    assert kernel_for("attention", "auto", LONG).backend is Backend.NATIVE
    assert "WRONG, never chosen: it is off by 0.1" in capsys.readouterr().out


def test_nor_is_one_that_fails(tuned, capsys):
    tuned({"seconds": {"native": 2.0, "stock": 1.0}, "broken": ["stock"]})
    assert kernel_for("attention", "auto", LONG).backend is Backend.NATIVE
    assert "no kernel image" in capsys.readouterr().out


def test_memory_that_is_too_small_ends_one_case_only(tuned, capsys, monkeypatch):
    def ready(case, device, *, small):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FakeCase, "ready", ready)
    tuned({"seconds": {}}, {"seconds": {}, "keys": 3})
    said = capsys.readouterr().out
    assert said.count("too small") == 2 and "nothing to choose here" in said


def test_as_good_as_the_fastest_keeps_the_order_of_before(tuned):
    tuned({"seconds": {"native": 1.02, "stock": 1.0}})
    assert kernel_for("attention", "auto", LONG).backend is Backend.NATIVE


def test_a_dry_run_writes_nothing(tuned, folder, capsys):
    figures = folder / "figures.json"
    tuned({"seconds": {"native": 2.0, "stock": 1.0}}, options=("--dry-run", "--json", str(figures)))
    assert list(folder.iterdir()) == [figures]
    report = json.loads(figures.read_text())
    assert report["architecture"] == "cpu" and report["rounds"] == 3
    (choice,) = report["choices"]
    assert choice["seconds"] == {"native": 2.0, "stock": 1.0}
    assert choice["order"] == ["stock", "native"]
    assert "not written" in capsys.readouterr().out


def test_what_was_not_measured_now_stays(tuned):
    put([auto.Rule("temporal_attention", {}, (Backend.NATIVE,))])
    tuned({"seconds": {"native": 2.0, "stock": 1.0}})
    operations = [rule.operation for rule in auto.users(CPU).rules["cpu"]]
    assert operations == ["attention", "temporal_attention"]


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: {"tune": {"measured": one}}])
def test_figures_become_the_shipped_table(wrap, tuned, folder, monkeypatch, capsys):
    figures, shipped = folder / "figures.json", folder / "auto.json"
    options = ("--dry-run", "--json", str(figures))
    tuned({"seconds": {"native": 2.0, "stock": 1.0}}, options=options)
    figures.write_text(json.dumps(wrap(json.loads(figures.read_text()))))
    before = set(auto.shipped().rules)
    shipped.write_text(auto.shipped().path.read_text())
    monkeypatch.setattr(auto, "_SHIPPED", shipped)
    _choice.forget_choices()
    for _ in range(2):  # once more changes nothing
        assert main(["tune", "--from-results", str(figures)]) == 0
        _choice.forget_choices()
        table = auto.shipped()
        assert [rule.order[0] for rule in table.rules["cpu"]] == [Backend.STOCK]
        assert set(table.rules) == {"cpu", *before} == set(table.made)
    assert kernel_for("attention", "auto", LONG).backend is Backend.STOCK


@pytest.mark.parametrize(
    "change",
    [{"operation": "nope"}, {"order": ["triton"]}, {"order": ["cuda"]}, {"when": {"moon": "full"}}],
    ids=["operation", "other device", "no kernel", "trait"],
)
def test_figures_that_make_no_table_leave_the_shipped_one(change, tuned, folder, monkeypatch, capsys):
    figures, shipped = folder / "figures.json", folder / "auto.json"
    tuned({"seconds": {"native": 2.0, "stock": 1.0}}, options=("--dry-run", "--json", str(figures)))
    report = json.loads(figures.read_text())
    report["choices"][0] |= change
    figures.write_text(json.dumps(report))
    shipped.write_text(auto.shipped().path.read_text())
    before = shipped.read_text()
    monkeypatch.setattr(auto, "_SHIPPED", shipped)
    _choice.forget_choices()
    assert main(["tune", "--from-results", str(figures)]) == 2
    assert "makes no table" in capsys.readouterr().err
    assert shipped.read_text() == before


def test_what_a_users_table_cannot_serve_goes_to_the_shipped_one(folder):
    put([auto.Rule("attention", {}, (Backend.STOCK,))])
    assert kernel_for("attention", "auto", LONG).backend is Backend.STOCK
    assert kernel_for("attention", "auto", LONG._replace(key_bias=True)).backend is Backend.NATIVE


@pytest.mark.parametrize("text", ["{}", "[]", "no", '{"tune": {"choices": [], "architecture": "cpu"}}'])
def test_other_files_are_refused(text, folder, capsys):
    (folder / "file.json").write_text(text)
    assert main(["tune", "--from-results", str(folder / "file.json")]) == 2
    assert capsys.readouterr().err.startswith("cvg-kernels tune: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--operation", "max_flow"], "--operation must be one of attention, temporal_attention"),
        (["--device", "fridge"], "--device fridge cannot be used"),
        (["--device", "meta"], "--device must be cpu or cuda"),
        (["--json", "/no/such/folder/file"], "--json must lie in a folder that exists"),
        (["--from-results", "/no/such/file"], "--from-results: /no/such/file cannot be read"),
    ],
)
def test_bad_options(options, message, capsys):
    assert main(["tune", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_class_is_one_of_its_own_and_in_the_kernels_reach(device):
    """Two cases of one class would overrule each other, and a case that only one kernel takes has no choice."""
    found = list(tuning_cases.cases(torch.device(device), tuning_cases.OPERATIONS))
    classes = set()
    for case in found:
        facts = case.facts(torch.device(device))
        classes.add((case.operation, *sorted(auto.traits(case.operation, facts).items())))
        taken = [
            one
            for one, kernel in tuning.kernels_of(case.operation).items()
            if kernel.refusal(facts) is None and device in kernel.devices
        ]
        assert len(taken) >= 2, case
    assert len(classes) == len(found) > 0
