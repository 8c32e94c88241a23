"""What `auto` means: tables of which backend comes first, per architecture and class of calls.

The shipped table is `auto.json` beside this file. `cvg-kernels tune` measures a machine and writes a table of its own
for each device into a cache folder; what it holds goes before the shipped one. A table is a list of rules for each
architecture (`cpu`, `sm_90`, `gfx942`, …; what holds for every other one is under `any cpu` and `any gpu`). The first
rule of an operation whose conditions hold for the call gives the order; the reference, which takes everything, comes
last in each.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cvg_kernels import __version__
from cvg_kernels.kernels import KERNELS, Backend, Facts, kernels_of
from cvg_kernels.reading import parse_json, read_bytes
from cvg_kernels.writing import written

FORMAT = 1
#: The environment variable that names the folder of the user's tables.
FOLDER_VARIABLE = "CVG_AUTO_DIR"
#: Keys up to which a call is short.
SHORT_KEYS = 1024
_DIMS = (64, 128, 256)
_FRAMES = (16, 32, 64, 128)
_SHIPPED = Path(__file__).with_name("auto.json")

#: What rules can ask about; see `traits`.
_TRAITS = frozenset(["bits", "dtype", "frames", "head_dim", "keys", "masked", "band", "maps", "through", "gradients"])

Traits = dict[str, Any]


class Rule(NamedTuple):
    """The order of backends for a class of calls."""

    operation: str
    when: Traits  #: what must hold of the call; nothing: always
    order: tuple[Backend, ...]


class Table(NamedTuple):
    """Rules by architecture, and where they come from."""

    path: Path
    made: dict[str, str]  #: when and how, by architecture
    rules: dict[str, tuple[Rule, ...]]


class BadTable(ValueError):
    """A table that cannot be read; says why."""


def traits(operation: str, facts: Facts) -> Traits:
    """The class of a call: what rules may ask about.

    Args:
        operation: a key of `KERNELS`, or one with `_backward` after it.
        facts: facts of the call.
    """
    found: Traits = {"bits": 8 * facts.dtype.itemsize}
    if facts.device.type == "cpu":  # a GPU takes as long for one kind of 16 bits as for the other
        found["dtype"] = str(facts.dtype).removeprefix("torch.")
    if operation.startswith("temporal_attention"):
        found["frames"] = _class_of(facts.frames, _FRAMES)
        found["head_dim"] = _class_of(max(facts.head_dim, facts.value_dim), _DIMS)
    elif operation.startswith(("attention", "frame_band_attention")):
        found["keys"] = "short" if facts.keys <= SHORT_KEYS else "long"
        found["head_dim"] = _class_of(max(facts.head_dim, facts.value_dim), _DIMS)
        found["masked"] = facts.key_bias or facts.token_bias
        found["band"] = facts.band
    if operation == "attention_backward":
        found["through"] = "maps" if facts.grad_maps or facts.grad_lse else "out"
        found["gradients"] = "all" if facts.need_key or facts.need_value else "query"
    return found


def _class_of(size: int, bounds: tuple[int, ...]) -> int | str:
    """The smallest bound that holds a size."""
    return next((bound for bound in bounds if size <= bound), "more")


def order(operation: str, facts: Facts) -> tuple[Backend, ...]:
    """The backends of a call in the order in which `auto` takes them; whether one can is another question."""
    if facts.device.type not in ("cpu", "cuda"):
        return (Backend.REFERENCE,)
    called = traits(operation, facts)
    line = operation if operation in KERNELS else operation.removesuffix("_backward")
    found: list[Backend] = []
    for rules in _rules_of(facts.device):  # what the first table's backends cannot serve, those of the next may
        fitting = (r for r in rules if r.operation == line and r.when.items() <= called.items())
        found += next((rule.order for rule in fitting), ())
    return tuple(dict.fromkeys((*found, Backend.REFERENCE)))


def _rules_of(device: torch.device) -> list[tuple[Rule, ...]]:
    """The lists of rules for a device, the one that goes first first."""
    name, others = architecture(device), "any cpu" if device.type == "cpu" else "any gpu"
    tables = [table for table in (users(device), shipped()) if table is not None]
    return [*(table.rules[name] for table in tables if name in table.rules), shipped().rules[others]]


@lru_cache
def architecture(device: torch.device) -> str:
    """What kernels are compiled for: `cpu`, `sm_90`, `gfx942`, …; `none` where no GPU is seen.

    `cpu_amx` is a CPU with units for products of bfloat16 matrices, which torch's attention uses and ours does not.
    """
    if device.type == "cpu":
        return "cpu_amx" if "amx_bf16" in _cpu_flags() else "cpu"
    if not torch.cuda.is_available():
        return "none"
    facts = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return facts.gcnArchName.partition(":")[0]
    return f"sm_{facts.major}{facts.minor}"


def _cpu_flags() -> list[str]:
    """The processor's features, where the system says."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return found.group(1).split() if found else []


@lru_cache
def device_name(device: torch.device) -> str:
    """The name of the processor or the GPU."""
    if device.type == "cpu" or not torch.cuda.is_available():
        from cvg_kernels.environment import processor

        return processor()
    return torch.cuda.get_device_name(device)


# --- files -----------------------------------------------------------------------------------------------------------


@lru_cache
def shipped() -> Table:
    """The table of the package."""
    return read(_SHIPPED)


@lru_cache
def users(device: torch.device) -> Table | None:
    """The user's table for a device, or `None`; one that cannot be read gives a warning."""
    path = user_path(device)
    if not path.is_file():
        return None
    try:
        return read(path, written_by=__version__)
    except (OSError, BadTable) as error:
        warnings.warn(
            f"the table of backends {path} is ignored: {error} (`cvg-kernels tune` writes a new one)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def why_no_users(device: torch.device) -> str:
    """Why `users` finds no table for a device."""
    path = user_path(device)
    try:
        read(path, written_by=__version__)
    except FileNotFoundError:
        return f"{path} is not there"
    except (OSError, BadTable) as error:
        return f"{path} is ignored: {error}"
    return f"{path} was not there when this process first looked"


def user_path(device: torch.device) -> Path:
    """Where the user's table for a device lies: `$CVG_AUTO_DIR`, or the folder for caches of the platform."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        place = Path(folder)
    elif os.environ.get("XDG_CACHE_HOME"):
        place = Path(os.environ["XDG_CACHE_HOME"]) / "cvg_kernels"
    elif sys.platform == "win32":
        place = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "cvg_kernels"
    elif sys.platform == "darwin":
        place = Path.home() / "Library/Caches/cvg_kernels"
    else:
        place = Path.home() / ".cache/cvg_kernels"
    name = re.sub(r"[^A-Za-z0-9]+", "-", device_name(device)).strip("-")
    return place / f"auto-{architecture(device)}-{name}.json"


def read(path: Path, *, written_by: str | None = None) -> Table:
    """Reads a table.

    Args:
        path: path of the file.
        written_by: the version of this package that must have written it; `None`: any.

    Raises:
        OSError: if the file cannot be read.
        BadTable: if it holds something else.
    """
    try:
        found = parse_json(read_bytes(path), path.name)
        if found["format"] != FORMAT:
            raise BadTable(f"its format is {found['format']!r}, this version reads {FORMAT}")
        if written_by is not None and found["version"] != written_by:
            raise BadTable(f"cvg_kernels {found['version']} wrote it, this is {written_by}")
        rules = {
            name: tuple(_rule(line, "cpu" if "cpu" in name else "cuda") for line in lines)
            for name, lines in found["tables"].items()
        }
        made = dict(found["made"])
        if not all(isinstance(text, str) for text in made.values()):
            raise BadTable('its "made" must say when and how, as text')
        return Table(path, made, rules)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadTable(f"it is not as `tune` writes it ({type(error).__name__}: {error})") from None
    except BadTable:
        raise
    except ValueError as error:  # JSON, UTF-8, or a name that is no backend
        raise BadTable(str(error)) from None


def _rule(line: Traits, device_type: str) -> Rule:
    operation, backends = line["operation"], tuple(map(Backend, line["order"]))
    if operation.removesuffix("_backward") not in KERNELS:
        raise BadTable(f"there is no operation {operation!r}")
    kernels = kernels_of(operation)
    for backend in backends:
        if backend not in kernels:
            raise BadTable(f"{operation} has no {backend.value} kernel")
        if kernels[backend].devices and device_type not in kernels[backend].devices:
            raise BadTable(f"the {backend.value} kernel of {operation} is not for {device_type}")
    if not backends:
        raise BadTable(f"a rule of {operation} names no backend")
    if not isinstance(line["when"], dict) or not all(isinstance(value, (str, int)) for value in line["when"].values()):
        raise BadTable(f"a rule of {operation} has conditions that are none: {line['when']!r:.80}")
    unknown = set(line["when"]) - _TRAITS
    if unknown:
        raise BadTable(f"a rule of {operation} asks for {', '.join(sorted(unknown))}, which no call has")
    return Rule(operation, dict(line["when"]), backends)


def _line(rule: Rule) -> str:
    """A rule as it is written: one line."""
    order = [backend.value for backend in rule.order]
    return "      " + json.dumps({"operation": rule.operation, "when": rule.when, "order": order})


def write(path: Path, tables: Mapping[str, Sequence[Rule]], made: Mapping[str, str]) -> None:
    """Writes a table in one step, so that nobody reads half of it, and only if it can be read.

    Args:
        path: path of the file; its folder is made.
        tables: rules by architecture.
        made: when and how, by architecture.

    Raises:
        BadTable: if these are no rules; the file is left as it was.
    """
    head = {"format": FORMAT, "version": __version__, "made": dict(made)}
    lists = ",\n".join(
        f"    {json.dumps(name)}: [\n" + ",\n".join(map(_line, rules)) + "\n    ]" for name, rules in tables.items()
    )
    text = json.dumps(head, indent=2).removesuffix("\n}") + ',\n  "tables": {\n' + lists + "\n  }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as new:
        new.write_text(text, encoding="utf-8")
        read(new)
