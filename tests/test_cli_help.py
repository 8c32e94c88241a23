"""The program's help: it comes without torch, shows every default, and a misspelt name suggests the nearest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module

import pytest

from cvg_kernels.cli import main
from cvg_kernels.cli.defaults import defaults_of
from cvg_kernels.cli.main import COMMANDS
from cvg_kernels.errors import nearest

#: Prints the help of every command and of each of its actions, and then which of the heavy modules were imported.
_HELP = """
import argparse, contextlib, importlib, io, json, sys
from cvg_kernels.cli.main import COMMANDS
from cvg_kernels.cli.parser import Parser

said = {}
for name in COMMANDS:
    parser = Parser(prog=name)
    importlib.import_module(f"cvg_kernels.cli.{name}").add_arguments(parser)
    parsers = [parser]
    for one in parsers:
        said[one.prog] = one.format_help()
        for action in one._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
heavy = {"torch", "numpy", "diffusers", "transformers", "triton"} & {name.partition(".")[0] for name in sys.modules}
print(json.dumps([said, sorted(heavy)]))
"""


@pytest.fixture(scope="module")
def helps():
    done = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_help_imports_nothing_heavy(helps):
    said, heavy = helps
    assert set(said) >= {*COMMANDS, "shapes train", "scenes eval", "cvg train"}
    assert heavy == []


def test_help_tells_what_every_option_does_and_its_default(helps):
    for name, text in helps[0].items():
        options = re.split(r"\n  (?=-)", text.partition("options:\n")[2])
        for option in options:
            assert len(option.split()) > 2, f"{name}: {option}"
            assert option.count("default") < 2, f"{name}: {option}"
        assert "None" not in text
    edit = " ".join(helps[0]["edit"].split())
    for shown in ("nothing; default: 3", "freer; default: 1.0", "default: a clip drawn from the seed"):
        assert shown in edit
    assert "--seed SEED seed of the noise that both clips begin with; default: 0" in " ".join(
        helps[0]["generate"].split()
    )


def test_help_of_an_action_says_what_it_does(helps):
    """What the list of actions says of it, or more."""
    for name, text in helps[0].items():
        command, _, action = name.partition(" ")
        if not action:
            continue
        said = text.split("\n\n")[1]
        assert re.match(r"[A-Z].* .*[.…]$", said, re.DOTALL), f"{name}: {said}"
        assert re.search(rf"\n +{action}\s+[a-z]", helps[0][command])


def test_help_names_the_questions_of_the_world_of_scenes(helps):
    pytest.importorskip("diffusers")
    from cvg_kernels.scenes.classifier_clips import LABELS

    assert f"what it learns to tell, {' or '.join(LABELS)};" in " ".join(helps[0]["cvg train"].split())


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("cvg_kernels.generate", "Job"),
        ("cvg_kernels.edit", "EditJob"),
        ("cvg_kernels.shapes.train", "Recipe"),
        ("cvg_kernels.scenes.train", "Recipe"),
        ("cvg_kernels.training.train", "Recipe"),
        ("cvg_kernels.shapes.classifier_clips", "Clips"),
        ("cvg_kernels.scenes.classifier_clips", "Clips"),
    ],
)
def test_defaults_are_those_of_the_dataclass(module, name):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    made = {one.name: one.default for one in fields(getattr(import_module(module), name))}
    read = defaults_of(module, name)
    assert read and read == {name: made[name] for name in read}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["genrate", "x"], "got 'genrate'; did you mean 'generate'?"),
        (["generate", "--guidence", "cvg", "x"], "got '--guidence'; did you mean '--guidance'?"),
        (["generate", "--guidence=cvg", "x"], "got '--guidence'; did you mean '--guidance'?"),
        (["shapes", "trian"], "must be one of train, eval, sweep, long, edits, got 'trian'; did you mean 'train'?"),
        (["shapes", "eval", "--promts", "3"], "got '--promts'; did you mean '--prompts'?"),
        (["bench", "atention"], "got 'atention'; did you mean 'attention'?"),
        (
            ["info", "--nonsense"],
            "option must be one of --help, --json, got '--nonsense' (see cvg-kernels info --help)",
        ),
        (["info", "extra"], "no further argument is accepted, got 'extra' (see"),
    ],
)
def test_a_misspelt_argument_suggests_the_nearest(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    told = capsys.readouterr().err
    assert (stop.value.code, told.count("\n")) == (2, 1)
    assert said in told


def test_nearest_suggests_a_name_or_nothing():
    assert nearest("vicco", ("none", "cvg", "vico")) == "; did you mean 'vico'?"
    assert nearest("CVG", ("none", "cvg")) == "; did you mean 'cvg'?"
    assert nearest("magic", ("none", "cvg", "vico")) == ""
    assert nearest(3, ("cvg", None)) == nearest("cvgs", (None, 3)) == ""
