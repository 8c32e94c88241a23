"""The program: `info`, one-line errors, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
import torch

import cvg_kernels
from cvg_kernels import auto, backends, environment
from cvg_kernels.cli import main
from cvg_kernels.kernels import KERNELS


@pytest.fixture
def command(monkeypatch):
    """Puts a command of the test's own in the place of `info`."""

    def put(run):
        module = types.ModuleType("cvg_kernels.cli.info")
        module.add_arguments = lambda parser: parser.add_argument("--size", type=int)
        module.run = run
        monkeypatch.setitem(sys.modules, "cvg_kernels.cli.info", module)

    return put


def test_info_prints_every_operation_with_each_backend(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    for title in ("versions", "devices", "native modules"):
        assert f"{title}\n" in said
    assert "auto on cpu\n" in said
    for operation, there in KERNELS.items():
        part = said.partition(f"kernels of {operation}\n")[2].partition("kernels of ")[0]
        for backend, kernel in there.items():
            reason = backends.unavailable_reason(operation, backend)
            line, _, rest = part.partition(f"  {backend.value:20}")[2].partition("\n")
            assert line == (reason or "yes")
            taken = rest.splitlines()[0]
            assert all(name in taken for name in (*kernel.devices, *kernel.dtypes))
            assert all(f"takes {limit.says}\n" in rest for limit in kernel.limits)


def test_info_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["cvg_kernels"] == cvg_kernels.__version__
    assert facts["devices"]["cpu"]
    assert set(facts["native modules"]) == {"cpu", "cuda"}
    assert set(facts["backends"]) == set(backends.OPERATIONS)
    assert all(answers["reference"] == "yes" for answers in facts["backends"].values())
    assert set(facts["kernels"]) == set(KERNELS)
    assert facts["kernels"]["temporal_attention"]["cuda"]["limits"][0] == "frames 16 to 128"
    assert facts["auto"]["cpu"]["table"] == "shipped"
    assert facts["auto"]["cpu"]["path"] == str(auto.shipped().path)


def test_info_begins_with_what_works_here(capsys, monkeypatch):
    monkeypatch.setattr("cvg_kernels.environment.devices", lambda: {"cpu": "a CPU", "cuda": "none: torch sees no GPU"})
    monkeypatch.setattr("cvg_kernels.native.reason", lambda target: None)
    monkeypatch.setattr("cvg_kernels.environment.modules", lambda: {})
    assert main(["info"]) == 0
    line = capsys.readouterr().out.partition("\n")[0]
    assert line.startswith("The kernels on the CPU are compiled; no GPU is used (torch sees no GPU); `cvg-kernels")

    facts = environment.report()
    facts["backends"]["attention"] |= {"native": "no compiler", "triton": "yes"}
    facts["devices"] = {"cpu": "a CPU", "cuda:0": "NVIDIA H100, sm_90, 80 GiB", "cuda:1": "NVIDIA H100, sm_90, 80 GiB"}
    facts["versions"] |= {"matplotlib": "not installed"}
    assert environment.summary(facts) == (
        "The kernels on the CPU are plain PyTorch, as no compiled module is there; those on NVIDIA H100 and 1 more "
        "are Triton's and torch's own; `cvg-kernels generate` needs `pip install 'cvg-kernels[video]'` (matplotlib)."
    )
    facts["backends"]["attention"] |= {"triton": "triton cannot be imported"}
    assert "H100 are torch's own and plain PyTorch (triton cannot be imported);" in environment.summary(facts)


def test_info_names_the_users_table(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CVG_AUTO_DIR", str(tmp_path))
    path = auto.user_path(torch.device("cpu"))
    name = auto.architecture(torch.device("cpu"))
    auto.write(path, {name: []}, {name: "on a Tuesday"})
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["auto"]["cpu"]
    assert (facts["path"], facts["made"]) == (str(path), "on a Tuesday")
    assert facts["table"].startswith("the user's")


@pytest.mark.filterwarnings("ignore:the table of backends")
def test_info_says_why_the_users_table_is_ignored(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CVG_AUTO_DIR", str(tmp_path))
    path = auto.user_path(torch.device("cpu"))
    told = []
    for text in (None, '{"format": 0}'):
        if text is not None:
            path.write_text(text)
        auto.users.cache_clear()
        assert main(["info", "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out)["auto"]["cpu"]["user's table"])
    assert told[0] == f"none: {path} is not there"
    assert told[1].startswith(f"none: {path} is ignored: its format is 0, this version reads")


def test_info_without_native_modules_says_why(capsys, monkeypatch):
    monkeypatch.setattr("cvg_kernels.native.reason", lambda target: f"no {target} compiler here")
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["native modules"] == {"cpu": "no cpu compiler here", "cuda": "no cuda compiler here"}
    assert facts["backends"]["attention"]["native"] == "no cpu compiler here"


@pytest.mark.parametrize("program", [["-m", "cvg_kernels"], ["-c", "from cvg_kernels.cli import main; main()"]])
def test_module_and_script_are_one_program(program):
    done = subprocess.run([sys.executable, *program, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"cvg-kernels {cvg_kernels.__version__}\n")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("info", "tune", "bench", "shapes", "generate"))


@pytest.mark.parametrize("name", ["info", "tune", "bench", "shapes", "generate"])
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: cvg-kernels {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["fly"], ["info", "--nonsense"], ["--nonsense", "info"], ["info", "extra"]])
def test_bad_command_line_is_one_line_and_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("cvg-kernels") and said.err.count("\n") == 1


@pytest.mark.parametrize("error", [cvg_kernels.ArgumentError, cvg_kernels.BackendUnavailableError])
def test_what_the_user_can_mend_is_one_line_and_2(error, command, capsys):
    def run(options):
        raise error(f"size must be even,\n  got {options.size}")

    command(run)
    assert main(["info", "--size", "3"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "cvg-kernels info: size must be even, got 3\n")


def test_a_defect_is_not_hidden(command):
    def run(options):
        raise ZeroDivisionError

    command(run)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_interrupt_is_130(command, capsys):
    def run(options):
        raise KeyboardInterrupt

    command(run)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "cvg-kernels info: interrupted\n"


def test_exit_code_is_the_commands(command):
    command(lambda options: 7)
    assert main(["info"]) == 7
