"""`make sanitize`: the CPU module under the compiler's sanitizers, the tests of the kernels and generated calls in it.

    python scripts/sanitize.py [address|thread|warnings …] [--calls N] [--tests FILE …]

`address` is AddressSanitizer and UndefinedBehaviorSanitizer in one, also for the code of CUDA kernels on the CPU,
`thread` is ThreadSanitizer, `warnings` compiles with -Wall -Wextra -Wconversion -Wshadow. Each builds into a folder of
its own under build/sanitize and stays there. The module that is in cvg_kernels/ is left as it is: a finder, in the
folder, loads the other one in its place.

What is switched off, and why:

- leaks: Python and torch keep memory until the process ends, and no stack of ours is in it. A kernel that leaked would
  show in tests/trust, which counts the memory of many calls.
- stacks after their function's end, in the emulation of CUDA kernels, whose lanes are fibers.
- races in modules that are not built here (Python, torch, GNU's OpenMP): those have no instrumentation, so what they
  wait for is not seen. Our own parallel regions run on plain threads instead (tests/sanitize/openmp_by_threads.cpp).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
#: The tests that call compiled kernels, without those that compile something themselves.
TESTS = (
    "test_attention.py",
    "test_attention_native.py",
    "test_coupled_max_flow.py",
    "test_frame_band_attention.py",
    "test_guidance_mix.py",
    "test_max_flow.py",
    "test_min_max_matmul.py",
    "test_path_flow.py",
    "test_temporal_attention.py",
    "test_temporal_maps.py",
    "test_token_peaks.py",
)
#: The code of CUDA kernels on the CPU, under `address` too; not what shows that the emulation's own watch sees faults.
EMULATED = ("test_max_flow_cuda.py", "test_temporal_attention_cuda.py")
FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1",
    "thread": "-fsanitize=thread -g1",
    "warnings": "-Wall -Wextra -Wconversion -Wshadow -Werror",
}
LIBRARIES = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so", "libstdc++.so"), "warnings": ()}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:strict_init_order=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:history_size=4",
}
FINDER = '''"""Loads the CPU module that a sanitizer watches."""

import importlib.util
import sys


class Sanitized:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "cvg_kernels._native_cpu":
            return importlib.util.spec_from_file_location(name, {file!r})
        return None


sys.meta_path.insert(0, Sanitized)
'''


def compiler() -> str:
    """GNU's compiler, whose OpenMP the module is linked with."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise SystemExit("a C++ compiler is needed (g++, or CXX)")
    return found


def build(kind: str, optimise: str) -> Path:
    """Builds the module for a sanitizer, and what loads it; returns the folder."""
    folder = BUILD / kind
    folder.mkdir(parents=True, exist_ok=True)
    flags, linked = FLAGS[kind], FLAGS[kind] if kind != "warnings" else ""
    if kind == "thread":
        threads = folder / "openmp_by_threads.o"
        source = ROOT / "tests" / "sanitize" / "openmp_by_threads.cpp"
        options = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", *flags.split()]
        subprocess.run([compiler(), *options, "-c", source, "-o", threads], check=True)
        linked += f" {threads}"
    import pybind11

    subprocess.run(
        [
            "cmake",
            "-S",
            ROOT,
            "-B",
            folder / "cmake",
            "-G",
            "Ninja",
            f"-DCMAKE_CXX_COMPILER={compiler()}",
            f"-DCMAKE_CXX_FLAGS={flags}",
            f"-DCMAKE_CXX_FLAGS_RELEASE={optimise}",
            f"-DCVG_OPTIMISE={optimise}",
            f"-DCMAKE_MODULE_LINKER_FLAGS={linked}",
            f"-DCVG_OUTPUT_DIR={folder}",
            "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        check=True,
    )
    subprocess.run(["cmake", "--build", folder / "cmake"], check=True)
    file = folder / f"_native_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    (folder / "sitecustomize.py").write_text(FINDER.format(file=str(file)))
    return folder


def environment(kind: str, folder: Path) -> dict[str, str]:
    """In which Python loads the module of a sanitizer."""
    named = [[compiler(), f"-print-file-name={name}"] for name in LIBRARIES[kind]]
    found = [subprocess.run(n, check=True, capture_output=True, text=True).stdout for n in named]
    path = os.pathsep.join([str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    preloaded = ":".join(str(Path(name.strip()).resolve()) for name in found)
    return os.environ | OPTIONS | {"LD_PRELOAD": preloaded, "PYTHONPATH": path, "CVG_SANITIZED": kind}


def run(kind: str, optimise: str, calls: int, tests: list[str]) -> None:
    """Runs the tests and the generated calls under a sanitizer; the first report ends it."""
    began = time.monotonic()
    folder = build(kind, optimise)
    print(f"{kind}: built in {time.monotonic() - began:.0f} s", flush=True)
    if kind == "warnings":
        return
    watched = environment(kind, folder)
    loaded = "import cvg_kernels.native as n; print(n.load('cpu').__file__)"
    where = subprocess.run(
        [sys.executable, "-c", loaded], env=watched, check=True, capture_output=True, text=True
    ).stdout.strip()
    if not where.startswith(str(folder)):
        raise SystemExit(f"{where} was loaded, not the module in {folder}")
    paths = [str(ROOT / "tests" / "ops" / name) for name in tests]
    pytest = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "native or not triton", *paths]
    fuzz = ["-m", "tests.fuzz", "--backends", "native", "--calls", str(calls)]
    if tests:
        took(kind, "tests", pytest, watched)
    if tests and kind == "address":
        # Lanes are fibers, between whose stacks the emulation changes: none is followed past its function's end.
        fibers = watched | {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
        paths = [str(ROOT / "tests" / "ops" / name) for name in EMULATED]
        pytest = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not barrier", *paths]
        took(kind, "emulated CUDA kernels", pytest, fibers)
    if calls:
        took(kind, f"{calls} generated calls", fuzz, watched)
    print(f"{kind}: clean")


def took(kind: str, name: str, command: list[str], watched: dict[str, str]) -> None:
    """Runs a part, and says how long it took."""
    began = time.monotonic()
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, env=watched)
    if ended.returncode:
        raise SystemExit(f"{kind}: {name}: {' '.join(command[:2])} ended with {ended.returncode}")
    print(f"{kind}: {name}: {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    """Reads the command line and runs what it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(FLAGS), help=f"of {', '.join(FLAGS)} (default: all)")
    parser.add_argument("--calls", type=int, default=5000, help="generated calls (default: %(default)s)")
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="files of tests/ops")
    parser.add_argument("--optimise", default="-O1", help="of the compiler (default: %(default)s)")
    given = parser.parse_args()
    for kind in given.kinds:
        if kind not in FLAGS:
            parser.error(f"{kind} is none of {', '.join(FLAGS)}")
        run(kind, given.optimise, given.calls, given.tests)


if __name__ == "__main__":
    main()
