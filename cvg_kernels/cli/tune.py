"""`cvg-kernels tune`: measures which kernels are fastest on this machine and writes what `auto` then goes by."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cvg_kernels.cli.arguments import path
from cvg_kernels.cli.defaults import defaults_of
from cvg_kernels.errors import ArgumentError, nearest
from cvg_kernels.reading import read_json
from cvg_kernels.writing import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tune`."""
    rounds = defaults_of("cvg_kernels.bench.tuning")["ROUNDS"]
    parser.add_argument("--device", help="cpu or cuda; default: the GPU, where there is one")
    parser.add_argument("--operation", help="tune this one alone; default: all that have a choice")
    parser.add_argument(
        "--rounds",
        type=int,
        help=f"timed rounds; the median counts; default: {rounds['cpu']} on a CPU, {rounds['cuda']} on a GPU",
    )
    parser.add_argument("--quick", action="store_true", help="smaller layers and 3 rounds")
    parser.add_argument("--dry-run", action="store_true", help="measure and print; write no table of backends")
    parser.add_argument("--json", type=path, help="also write the figures here, as they come")
    parser.add_argument(
        "--from-results",
        type=path,
        metavar="FILE",
        help="instead of measuring: put the figures of a result file of `make gpu` (or of --json) into the package's "
        "own table",
    )


def run(options: argparse.Namespace) -> int:
    """Measures, or takes over what was measured."""
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise ArgumentError(f"--json must lie in a folder that exists, got {options.json}")
    if options.from_results is not None:
        return _take_over(options.from_results, dry=options.dry_run)
    return _measure(options)


def _measure(options: argparse.Namespace) -> int:
    import torch

    from cvg_kernels import auto
    from cvg_kernels.bench import tuning, tuning_cases
    from cvg_kernels.ops._choice import forget_choices

    if options.rounds is not None and options.rounds < 1:
        raise ArgumentError(f"--rounds must be at least 1, got {options.rounds}")
    if options.operation not in (None, *tuning_cases.OPERATIONS):
        raise ArgumentError(
            f"--operation must be one of {', '.join(tuning_cases.OPERATIONS)} (others have one kernel on each "
            f"device), got {options.operation!r}"
            f"{nearest(options.operation, tuning_cases.OPERATIONS)}"
        )
    device = _device(torch, options.device)
    operations = tuning_cases.OPERATIONS if options.operation is None else (options.operation,)
    rounds = options.rounds or (3 if options.quick else tuning.ROUNDS[device.type])
    print(f"{auto.device_name(device)} ({auto.architecture(device)}), medians of {rounds} rounds")
    some = tuning_cases.cases(device, operations, quick=options.quick)

    def show(figures: dict[str, Any], report: dict[str, Any]) -> None:
        _show(figures)
        if options.json is not None:  # as they come: what ends this process does not take them away
            write_json(options.json, report)

    report = tuning.tune(device, some, rounds=rounds, show=show)
    rules = tuning.rules_of(report)
    if not rules:
        print("nothing to choose here: no class of calls has two kernels that can serve it")
        return 0
    path = auto.user_path(device)
    if options.dry_run:
        print(f"not written, as --dry-run says: {len(rules)} rules for {path}")
        return 0
    name = report["architecture"]
    auto.write(path, {name: _kept(path, rules)}, {name: tuning.made_by(report)})
    forget_choices()
    print(f"wrote {path}")
    return 0


def _kept(path: Path, rules: list) -> list:
    """New rules, and those of an older table of this device for what was not measured now."""
    from cvg_kernels import __version__, auto

    try:
        table = auto.read(path, written_by=__version__)
    except (OSError, auto.BadTable):
        return rules
    measured = {rule.operation for rule in rules}
    older = (rule for lines in table.rules.values() for rule in lines)
    return [*rules, *(rule for rule in older if rule.operation not in measured)]


def _take_over(path: Path, *, dry: bool) -> int:
    """Puts measured rules into the shipped table, in the place of those of their architecture."""
    from cvg_kernels import auto
    from cvg_kernels.bench import tuning

    try:
        results = read_json(path)
    except ArgumentError as error:
        raise ArgumentError(f"--from-results: {error}") from None
    report = tuning.section_of(results)
    rules, shipped = tuning.rules_of(report), auto.shipped()
    if not rules:
        raise ArgumentError(f"{path} holds no class of calls that had two kernels to choose from")
    made = shipped.made | {report["architecture"]: tuning.made_by(report)}
    tables = {report["architecture"]: rules} | {
        name: lines for name, lines in shipped.rules.items() if name != report["architecture"]
    }
    for rule in rules:
        print(f"{rule.operation:20}{_words(rule.when)}: {' → '.join(one.value for one in rule.order)}")
    if dry:
        print(f"not written, as --dry-run says: {len(rules)} rules for {shipped.path}")
        return 0
    try:
        auto.write(shipped.path, tables, made)
    except auto.BadTable as error:
        raise ArgumentError(f"{path} makes no table, {shipped.path} is as it was: {error}") from None
    print(f"wrote {shipped.path}")
    return 0


def _device(torch, name: str | None):
    """The device to tune, with its number."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"--device {name} cannot be used: {reason}") from None
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"--device must be cpu or cuda, got {name!r}")
    return device


def _words(when: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in when.items()) or "always"


def _show(figures: dict[str, Any]) -> None:
    """Prints what was found for one class of calls."""
    sizes = ", ".join(f"{name} {size}" for name, size in figures["sizes"].items())
    print(f"{figures['operation']}  {_words(figures['when'])}   [{sizes}, {figures['dtype']}]")
    for name, took in figures["seconds"].items():
        chosen = "  ← first" if figures["order"][:1] == [name] else ""
        print(f"  {name:10}{took if isinstance(took, str) else f'{took * 1e3:9.3f} ms'}{chosen}")
    for name, reason in figures["wrong"].items():
        print(f"  {name:10}WRONG, never chosen: {reason}")
    for name, reason in figures["absent"].items():
        print(f"  {name:10}not here: {reason}")
