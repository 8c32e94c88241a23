"""`cvg-kernels info`: what is installed, what it runs on, and which backends work."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

from cvg_kernels import __version__, native
from cvg_kernels.backends import OPERATIONS, unavailable_reason

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy", "imageio", "imageio-ffmpeg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `info`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def versions() -> dict[str, str]:
    """Versions of this package, Python and the packages it works with."""
    found = {"cvg_kernels": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> dict[str, str]:
    """The processor, with the instruction set that the native kernels chose, and every GPU."""
    import torch

    isa = native.load("cpu").isa() if native.reason("cpu") is None else "no native kernels"
    found = {"cpu": f"{_processor()}, {torch.get_num_threads()} threads, {isa}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        works = "no CUDA module"
        if native.reason("cuda") is None:
            problem = native.load("cuda").self_check(index)
            works = "CUDA module runs" if problem is None else f"CUDA module fails: {problem}"
        found[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {works}"
        )
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def report() -> dict[str, Any]:
    """Everything `info` shows, as plain data."""
    backends = {
        operation: {
            backend.value: unavailable_reason(operation, backend) or "yes" for backend in there
        }
        for operation, there in OPERATIONS.items()
    }
    return {"versions": versions(), "devices": devices(), "backends": backends}


def run(options: argparse.Namespace) -> int:
    """Prints the report."""
    facts = report()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for title in ("versions", "devices"):
        print(title)
        for name, value in facts[title].items():
            print(f"  {name:16} {value}")
    for operation, there in facts["backends"].items():
        print(f"backends of {operation}")
        for name, answer in there.items():
            print(f"  {name:16} {answer}")
    return 0
