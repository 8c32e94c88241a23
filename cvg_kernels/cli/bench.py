"""`cvg-kernels bench`: the kernels against what people use today, or what compilers make of them."""

from __future__ import annotations

import argparse
import importlib

from cvg_kernels.bench import BENCHMARKS
from cvg_kernels.cli.arguments import path
from cvg_kernels.errors import ArgumentError, nearest

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    parser.add_argument("operation", nargs="?", default="attention", choices=BENCHMARKS, help="what is measured")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="default: float32; for all kinds of attention on a GPU bfloat16"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of every arm; default: torch's own number")
    parser.add_argument(
        "--rounds", type=int, help="timed rounds; the median counts; default: the operation's own number"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--json", type=path, help="also write the figures here, as they come")
    parser.add_argument(
        "--static",
        action="store_true",
        help="instead: compile the Triton kernels for GPUs that need not be there, and print registers, spills, and "
        "per loop the instructions per score element and a modelled fraction of peak",
    )
    parser.add_argument("--targets", help="with --static: targets, separated by commas; default: all")
    parser.add_argument("--all", action="store_true", help="every operation; with --static every case, an hour")
    parser.add_argument(
        "--objects", action="store_true", help="with --static: the kernels of the CUDA module that was built"
    )
    parser.add_argument("--processes", type=int, default=2, help="with --static: compilers at work at once")


def run(options: argparse.Namespace) -> int:
    """Measures, or compiles."""
    if options.processes < 1:
        raise ArgumentError(f"--processes must be at least 1, got {options.processes}")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise ArgumentError(f"--json must lie in a folder that exists, got {options.json}")
    return _static(options) if options.static else _measure(options)


def _measure(options: argparse.Namespace) -> int:
    import torch

    for name in ("threads", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ArgumentError(f"--{name} must be at least 1, got {value}")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"--device {options.device} cannot be used: {reason}") from None
    if options.all and options.json is not None:
        raise ArgumentError("--json takes one operation's figures; with --all leave it out")
    from cvg_kernels.bench import runner

    for operation in BENCHMARKS if options.all else [options.operation]:
        low = device.type != "cpu" and operation.endswith("attention")
        runner.run(
            importlib.import_module(f"cvg_kernels.bench.{operation}"),
            device,
            getattr(torch, options.dtype or ("bfloat16" if low else "float32")),
            quick=options.quick,
            rounds=options.rounds,
            path=options.json,
        )
    return 0


def _static(options: argparse.Namespace) -> int:
    from cvg_kernels.bench.static import budgets, cases, compiled, objects, report

    if options.objects:
        module = objects.built_module()
        if module is None:
            raise ArgumentError("--objects needs the CUDA module, which was not built")
        rows, versions = objects.module_rows(module), {"nvcc": objects.compiler(module)}
        report.print_objects(rows)
        if options.json is not None:
            budgets.write(options.json, rows, versions)
        return 0
    targets = options.targets.split(",") if options.targets else list(compiled.TARGETS)
    unknown = set(targets) - set(compiled.TARGETS)
    if unknown:
        raise ArgumentError(
            f"--targets must be of {', '.join(compiled.TARGETS)}, got {', '.join(sorted(unknown))}"
            f"{nearest(min(unknown), compiled.TARGETS)}"
        )
    jobs = [job for job in (cases.whole if options.all else cases.covering)() if job[1] in targets]
    rows = report.print_table(compiled.collect(jobs[:2] if options.quick else jobs, options.processes))
    if options.json is not None:
        budgets.write(options.json, rows, budgets.compilers())
    return 0
