"""What is installed, what it runs on, and which backends work: for `info`, reports and benchmarks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from cvg_kernels import __version__, native
from cvg_kernels.backends import OPERATIONS, unavailable_reason
from cvg_kernels.kernels import KERNELS

_PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "numpy",
    "imageio",
    "imageio-ffmpeg",
    "matplotlib",
)
#: Those of them that the package itself does without, and its program does not.
_VIDEO = ("transformers", "accelerate", "imageio", "imageio-ffmpeg", "matplotlib")


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
    """The processor and every GPU that torch can use, or why there is none."""
    import torch

    found = {"cpu": f"{processor()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        kind = getattr(facts, "gcnArchName", "") if torch.version.hip else ""
        kind = kind or f"sm_{facts.major}{facts.minor}"
        found[f"cuda:{index}"] = f"{facts.name}, {kind}, {facts.total_memory / 2**30:.0f} GiB"
    if len(found) == 1:
        built = torch.backends.cuda.is_built()
        found["cuda"] = f"none: torch {'sees no GPU' if built else 'is a build for CPU only'}"
    return found


def modules() -> dict[str, str]:
    """Per compiled module what it was built for and runs as, or the reason why it is absent."""
    import torch

    found = {}
    build = native.build_info()
    if (reason := native.reason("cpu")) is None:
        compiler = build.get("compiler") or "a compiler that was not written down"
        module = native.load("cpu")
        level, here = module.isa(), module.processor_levels()[-1]
        if os.environ.get(native.LEVEL_VARIABLE):
            level += f" ({native.LEVEL_VARIABLE}; this machine can run {module.levels()[-1]})"
        reason = f"yes: {level}, built by {compiler} for {', '.join(module.built_levels())}"
        if here not in module.built_levels():
            reason += f"; this machine can run {here} too: reinstall here, or with CVG_CPU_LEVELS=all"
    found["cpu"] = reason
    if (reason := native.reason("cuda")) is None:
        reason = f"yes: built for {', '.join(build.get('cuda_archs') or ['?'])}"
        for index in range(torch.cuda.device_count()):
            problem = native.load("cuda").self_check(index)
            reason += f"; cuda:{index} {'runs it' if problem is None else f'fails: {problem}'}"
    found["cuda"] = reason
    return found


def backends() -> dict[str, dict[str, str]]:
    """Per operation and backend "yes" or the reason why it cannot run on this machine."""
    return {
        operation: {backend.value: unavailable_reason(operation, backend) or "yes" for backend in kernels}
        for operation, kernels in OPERATIONS.items()
    }


def kernels() -> dict[str, dict[str, dict[str, Any]]]:
    """The table of kernels as plain data: per operation and backend what it takes, and "yes" or why it cannot run
    here.
    """
    return {
        operation: {
            backend.value: {
                "module": kernel.module,
                "devices": list(kernel.devices) or ["any"],
                "dtypes": list(kernel.dtypes) or ["any floating point"],
                "limits": [limit.says for limit in kernel.limits],
                "available": unavailable_reason(operation, backend) or "yes",
            }
            for backend, kernel in by_backend.items()
        }
        for operation, by_backend in KERNELS.items()
    }


def automatic() -> dict[str, dict[str, str]]:
    """Per device which table `auto` goes by: whose it is, the file, and when and how it was made."""
    import torch

    from cvg_kernels import auto

    found = {}
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for name, device in zip(names, map(torch.device, names), strict=True):
        shipped, users, architecture = auto.shipped(), auto.users(device), auto.architecture(device)
        rules = f"any {'cpu' if device.type == 'cpu' else 'gpu'}"
        rules = architecture if architecture in shipped.rules else rules
        facts = {"table": "shipped", "path": str(shipped.path), "made": shipped.made.get(rules, "?")}
        if users is not None:
            origin = users.made.get(architecture, "?")
            facts = {"table": "the user's, then the shipped one", "path": str(users.path), "made": origin}
        else:
            facts["user's table"] = f"none: {auto.why_no_users(device)}"
        found[name] = {"architecture": architecture, **facts}
    return found


def summary(facts: dict[str, Any]) -> str:
    """Says in one sentence what works on this machine.

    Args:
        facts: those of `report`.
    """
    there, attention = facts["devices"], facts["backends"]["attention"]
    gpus = [name.partition(",")[0] for device, name in there.items() if device.startswith("cuda:")]
    if not gpus:
        gpu = f"no GPU is used ({there['cuda'].removeprefix('none: ')})"
    elif attention["triton"] == "yes":
        gpu = f"those on {gpus[0]}{f' and {len(gpus) - 1} more' if gpus[1:] else ''} are Triton's and torch's own"
    else:
        gpu = f"those on {gpus[0]} are torch's own and plain PyTorch ({attention['triton']})"
    cpu = "compiled" if attention["native"] == "yes" else "plain PyTorch, as no compiled module is there"
    missing = [name for name in _VIDEO if facts["versions"][name] == "not installed"]
    program = "`cvg-kernels generate` works"
    if missing:
        program = f"`cvg-kernels generate` needs `pip install 'cvg-kernels[video]'` ({', '.join(missing)})"
    return f"The kernels on the CPU are {cpu}; {gpu}; {program}."


def report() -> dict[str, Any]:
    """Everything `info` shows, as plain data."""
    facts = {
        "versions": versions(),
        "devices": devices(),
        "native modules": modules(),
        "backends": backends(),
        "kernels": kernels(),
        "auto": automatic(),
    }
    return {"summary": summary(facts)} | facts


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
