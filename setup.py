"""Builds the two native modules with CMake and writes down why one is absent.

CVG_BUILD decides what is built:

    auto  (default) what this machine can use: the CPU module and, where there is an NVIDIA GPU, the CUDA module for
          that GPU; a failure leaves pure Python and a stored reason
    cpu   the CPU module; its failure is fatal
    cuda  the CPU and the CUDA module, with or without a GPU; a failure of either is fatal
    none  pure Python

CVG_CPU_LEVELS: `native` (default), the best instructions that this machine's processor has and the baseline; `all`,
for modules that go to other machines.

CVG_CUDA_ARCHITECTURES names the GPUs that the CUDA module is for: `native`, or numbers as CMake takes them
("80;90a-real");
default: `native` under auto, otherwise all that nvcc knows of those supported. One takes a sixth of the time.

CVG_VERSION_LABEL is added to the version, for wheels. ccache is used where it is installed. The modules are two CMake
builds of their own, so that nothing in the CUDA build can take the CPU module down.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("CVG_BUILD", "auto").strip().lower() or "auto"
if MODE not in MODES:
    raise SystemExit(f"CVG_BUILD must be one of {', '.join(MODES)}; got {MODE!r}")
#: `setup.py -q` shows of CMake and the compiler only what failed.
QUIET = "-q" in sys.argv or "--quiet" in sys.argv
NOT_ASKED = "it was not asked for (CVG_BUILD=none)"
NO_GPU = "no NVIDIA GPU was found at build time"
LEVELS = os.environ.get("CVG_CPU_LEVELS", "native").strip().lower() or "native"
if LEVELS not in ("native", "all"):
    raise SystemExit(f"CVG_CPU_LEVELS must be native or all; got {LEVELS!r}")


class BuildFailed(Exception):
    """One module cannot be built; the message is the reason that users will read."""


def find_cxx() -> str:
    """The C++ compiler that CMake will take."""
    for name in (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++", "cl"):
        if name and shutil.which(name):
            return name
    raise BuildFailed("no C++ compiler was found at build time (CXX, c++, g++, clang++)")


def find_nvcc() -> str:
    """The CUDA compiler."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        candidates.append(home and shutil.which("nvcc", path=os.path.join(home, "bin")))
    for candidate in candidates:
        if candidate and shutil.which(candidate):
            return shutil.which(candidate)
    raise BuildFailed("nvcc was not found at build time (CUDACXX, PATH, CUDA_HOME, /usr/local/cuda)")


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU; torch need not be there to be asked."""
    if any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return True
    asked = shutil.which("nvidia-smi") and subprocess.run(
        ["nvidia-smi", "--list-gpus"], capture_output=True, text=True
    )
    return bool(asked) and asked.returncode == 0 and "GPU" in asked.stdout


def pybind11_dir() -> str:
    try:
        import pybind11
    except ImportError as error:
        raise BuildFailed(f"pybind11 was not found at build time: {error}") from None
    return pybind11.get_cmake_dir()


def run_logged(command: list[str], log: Path) -> None:
    """Runs a command, shows its output, and turns a failure into its first error line."""
    if not QUIET:
        print("+", " ".join(command), flush=True)
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    with log.open("a") as file:
        file.write(done.stdout)
    if not QUIET or done.returncode != 0:
        print(done.stdout, flush=True)
    if done.returncode == 0:
        return
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
    errors = [n for n, line in enumerate(lines) if re.search(r"\berror\b|fatal", line, re.I)]
    first = errors[0] if errors else max(len(lines) - 1, 0)
    said = " ".join(lines[first : first + 4])
    said = re.sub(r"CMake Error at \S+ \(\w+\): ", "", said)[:300]
    raise BuildFailed(f"{Path(command[0]).name} failed with exit code {done.returncode}: {said}")


def cmake_build(target: str, output: Path, build: Path) -> None:
    """Builds the module `target` ("cpu" or "cuda") into the folder `output`."""
    tools = {name: shutil.which(name) for name in ("cmake", "ninja")}
    for name, path in tools.items():
        if path is None:
            raise BuildFailed(f"{name} was not found at build time")
    find_cxx()
    options = {
        "CVG_CUDA": "ON" if target == "cuda" else "OFF",
        "CVG_OUTPUT_DIR": output,
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "CMAKE_MAKE_PROGRAM": tools["ninja"],
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11_dir(),
        "CVG_CPU_LEVELS": LEVELS,
    }
    if target == "cuda":
        default = "native" if MODE == "auto" else ""
        options["CMAKE_CUDA_COMPILER"] = find_nvcc()
        options["CVG_CUDA_ARCHITECTURES"] = os.environ.get("CVG_CUDA_ARCHITECTURES") or default
    if ccache := shutil.which("ccache"):
        for language in ("CXX", "CUDA"):
            options[f"CMAKE_{language}_COMPILER_LAUNCHER"] = ccache
    build.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    log = build / "build.log"
    log.unlink(missing_ok=True)
    # --fresh: an isolated build's tools lie in a folder that is gone the next time.
    configure = [tools["cmake"], "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
    run_logged(configure + [f"-D{name}={value}" for name, value in options.items()], log)
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
    run_logged([tools["cmake"], "--build", str(build), "--parallel", jobs], log)
    if not list(output.glob(f"_native_{target}*")):
        raise BuildFailed(f"CMake wrote no module _native_{target} into {output}")


def compiler_of(build: Path) -> str | None:
    """The C++ compiler of a CMake build, as "GNU 12.2.0"."""
    for file in build.glob("CMakeFiles/*/CMakeCXXCompiler.cmake"):
        found = dict(re.findall(r'set\(CMAKE_CXX_COMPILER_(ID|VERSION) "(.*?)"\)', file.read_text()))
        return f"{found.get('ID')} {found.get('VERSION')}"
    return None


def cuda_archs_of(build: Path) -> list[str]:
    """The GPU code in a CUDA module ("sm_90a", "compute_120" for PTX), off nvcc's command lines."""
    commands = build / "compile_commands.json"
    if not commands.exists():
        return []
    found = re.findall(r"code=\[?((?:(?:sm|compute)_\w+,?)+)", commands.read_text())
    names = {name for group in found for name in group.split(",") if name}
    return sorted(names, key=lambda name: (int(re.sub(r"\D", "", name)), name.startswith("compute")))


def write_build_info(package: Path, info: dict[str, object]) -> None:
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


class NativeBuild(build_ext):
    """Each extension is one CMake build; what fails under CVG_BUILD=auto becomes a stored reason."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        package = (ROOT if in_place else Path(self.build_lib).resolve()) / "cvg_kernels"
        temporary = Path(self.build_temp).resolve()
        info: dict[str, object] = {}
        for target in ("cpu", "cuda"):
            info[target] = self.attempt(target, package, temporary / target)
            if info[target] == NO_GPU:
                print("cvg-kernels: no NVIDIA GPU was found, so the CUDA module is left out; nothing here needs it")
            elif info[target] is not None:
                print(f"cvg-kernels: no native {target} module: {info[target]}", file=sys.stderr)
        info["compiler"] = compiler_of(temporary / "cpu") if info["cpu"] is None else None
        info["cuda_archs"] = cuda_archs_of(temporary / "cuda") if info["cuda"] is None else []
        write_build_info(package, info)

    def attempt(self, target: str, package: Path, build: Path) -> str | None:
        """Builds one module; the reason why not, if that may happen."""
        for stale in package.glob(f"_native_{target}*"):
            stale.unlink()
        if MODE == "none":
            return NOT_ASKED
        if target == "cuda" and MODE == "cpu":
            return "it was not asked for (CVG_BUILD=cpu)"
        if target == "cuda" and MODE == "auto" and not has_gpu():
            return NO_GPU
        try:
            if target == "cuda":
                find_nvcc()
            cmake_build(target, package, build)
        except BuildFailed as failure:
            if MODE != "auto":
                raise CompileError(
                    f"CVG_BUILD={MODE}, but the native {target} module cannot be built: {failure}"
                ) from None
            return str(failure)
        return None

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "cvg_kernels").glob("_native_*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class CleanBuildPy(build_py):
    """Copies into a clean folder, and writes the reason down where no extension's build does."""

    def run(self) -> None:
        build_lib = Path(self.build_lib).resolve()
        if not self.editable_mode and build_lib != ROOT:
            # setuptools packs whatever an earlier build left there, files and packages since removed as well
            for package in ("cvg_kernels", "python_ref"):
                shutil.rmtree(build_lib / package, ignore_errors=True)
        super().run()
        if MODE == "none":
            package = ROOT if self.editable_mode else build_lib
            info = {"cpu": NOT_ASKED, "cuda": NOT_ASKED, "compiler": None, "cuda_archs": []}
            write_build_info(package / "cvg_kernels", info)


MODULES = [Extension(f"cvg_kernels._native_{target}", sources=[]) for target in ("cpu", "cuda")]
setup(
    # "+cu130", say: it tells the wheel of one CUDA from that of another, and from the CPU's
    options={"egg_info": {"tag_build": os.environ.get("CVG_VERSION_LABEL", "")}},
    ext_modules=[] if MODE == "none" else MODULES,
    cmdclass={"build_ext": NativeBuild, "build_py": CleanBuildPy},
)
