"""What a wheel holds, what CVG_BUILD decides, and that a failed CUDA build leaves the CPU module alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cvg_kernels
from cvg_kernels import native

for module in ("setuptools", "wheel", "cmake", "ninja", "pybind11"):
    pytest.importorskip(module)

ROOT = Path(__file__).parents[1]
PACKAGED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CMakeLists.txt")

# Stands in for the real one: the CPU "module" is a file, the CUDA build fails as it would on an old compiler.
CMAKELISTS = """
cmake_minimum_required(VERSION 3.18)
project(fake LANGUAGES NONE)
if(CVG_CUDA AND NOT "$ENV{FAKE_CUDA}" STREQUAL "works")
    message(FATAL_ERROR "this compiler knows no such architecture")
endif()
set(name cpu)
if(CVG_CUDA)
    set(name cuda)
endif()
foreach(needed Python_EXECUTABLE pybind11_DIR CVG_OUTPUT_DIR)
    if(NOT EXISTS "${${needed}}")
        message(FATAL_ERROR "${needed} is no path: ${${needed}}")
    endif()
endforeach()
file(WRITE ${CMAKE_BINARY_DIR}/architectures "${CVG_CUDA_ARCHITECTURES}")
file(WRITE ${CMAKE_BINARY_DIR}/levels "${CVG_CPU_LEVELS}")
add_custom_target(module ALL COMMAND ${CMAKE_COMMAND} -E touch ${CVG_OUTPUT_DIR}/_native_${name}.so)
"""


def run(arguments, folder, check=True, **environment):
    # No variable but the test's own decides; and what is built is what lies in `folder`.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CVG_")}
    clean.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3600,  # ends a hang; a busy machine may take its time
    )
    assert not check or done.returncode == 0, done.stdout
    return done


@pytest.fixture
def project(tmp_path):
    """A project with our setup.py, a package of one file, and a CMakeLists.txt that takes no time."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CMakeLists.txt").write_text(CMAKELISTS)
    (tmp_path / "cvg_kernels").mkdir()
    (tmp_path / "cvg_kernels" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    return tmp_path


@pytest.fixture
def tools(tmp_path_factory):
    """A PATH with cmake, ninja, a C++ compiler and nvcc, none of which is looked at by the stand-in."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("cmake", "ninja"):
        found = shutil.which(name)
        assert found, f"{name} is on no PATH"
        (folder / name).symlink_to(found)
    for name in ("c++", "nvcc"):
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def gpu(tools):
    """The driver's program, which lists a GPU."""
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: made up'\n")
    (tools / "nvidia-smi").chmod(0o755)


def build_in_place(project, tools, mode, check=True, options=(), **environment):
    path = {"PATH": str(tools), "CVG_BUILD": mode, "CXX": "", "CUDACXX": ""} | environment
    done = run(["setup.py", *options, "build_ext", "--inplace"], project, check, **path)
    package = project / "cvg_kernels"
    stored = package / "_build_info.json"
    info = json.loads(stored.read_text()) if stored.exists() else {}
    return done, info, sorted(path.name for path in package.glob("_native_*"))


def test_auto_keeps_the_cpu_module_when_cuda_fails(project, tools, gpu):
    _, info, modules = build_in_place(project, tools, "auto")
    assert modules == ["_native_cpu.so"]
    assert info["cpu"] is None
    assert "this compiler knows no such architecture" in info["cuda"]


@pytest.mark.skipif(any(Path("/proc/driver/nvidia/gpus").glob("*")), reason="there is an NVIDIA GPU")
def test_auto_builds_for_the_gpu_that_is_there_alone(project, tools, request):
    done, info, modules = build_in_place(project, tools, "auto", FAKE_CUDA="works")
    assert modules == ["_native_cpu.so"]
    assert info["cuda"] == "no NVIDIA GPU was found at build time"
    assert "no NVIDIA GPU was found, so the CUDA module is left out; nothing here needs it" in done.stdout
    request.getfixturevalue("gpu")
    build_in_place(project, tools, "auto", FAKE_CUDA="works")
    (file,) = project.glob("build/*/cuda/architectures")
    assert file.read_text() == "native"


@pytest.mark.drawn(8, of="long tests")
def test_the_levels_to_build_reach_cmake(project, tools):
    for asked in ("native", "all", ""):
        build_in_place(project, tools, "cpu", CVG_CPU_LEVELS=asked)
        (file,) = project.glob("build/*/cpu/levels")
        assert file.read_text() == (asked or "native")
    done, _, _ = build_in_place(project, tools, "cpu", check=False, CVG_CPU_LEVELS="avx9")
    assert done.returncode != 0
    assert "CVG_CPU_LEVELS must be native or all; got 'avx9'" in done.stdout


def test_quiet_shows_the_compiler_only_where_it_failed(project, tools, gpu):
    done, _, _ = build_in_place(project, tools, "cpu", options=["-q"], FAKE_CUDA="works")
    assert "cmake" not in done.stdout
    done, info, _ = build_in_place(project, tools, "auto", options=["-q"])
    assert "this compiler knows no such architecture" in info["cuda"]
    assert done.stdout.count("this compiler knows no such architecture") == 2  # its own output, and the reason


def test_ccache_compiles_where_it_is(project, tools):
    (tools / "ccache").write_text("#!/bin/sh\n")
    (tools / "ccache").chmod(0o755)
    done, _, _ = build_in_place(project, tools, "cpu")
    assert f"-DCMAKE_CXX_COMPILER_LAUNCHER={tools / 'ccache'}" in done.stdout


def test_a_label_is_added_to_the_version(project):
    done = run(["setup.py", "-q", "egg_info"], project, CVG_VERSION_LABEL="+cu130")
    (facts,) = project.glob("*.egg-info/PKG-INFO")
    assert "\nVersion: 0.1.0+cu130\n" in facts.read_text(), done.stdout


@pytest.mark.drawn(8, of="long tests")
def test_both_modules(project, tools, gpu):
    for mode in ("auto", "cuda"):
        _, info, modules = build_in_place(project, tools, mode, FAKE_CUDA="works")
        assert modules == ["_native_cpu.so", "_native_cuda.so"]
        assert (info["cpu"], info["cuda"]) == (None, None)


@pytest.mark.drawn(8, of="long tests")
def test_the_gpus_to_build_for_reach_cmake(project, tools):
    for asked in ("native", ""):
        build_in_place(project, tools, "cuda", FAKE_CUDA="works", CVG_CUDA_ARCHITECTURES=asked)
        (file,) = project.glob("build/*/cuda/architectures")
        assert file.read_text() == asked


def test_cuda_makes_its_failure_fatal(project, tools):
    done, _, modules = build_in_place(project, tools, "cuda", check=False)
    assert done.returncode != 0
    assert "CVG_BUILD=cuda, but the native cuda module cannot be built" in done.stdout
    assert "_native_cuda.so" not in modules


def test_cpu_leaves_cuda_alone_and_removes_a_stale_one(project, tools):
    (project / "cvg_kernels" / "_native_cuda.so").touch()
    _, info, modules = build_in_place(project, tools, "cpu", FAKE_CUDA="works")
    assert modules == ["_native_cpu.so"]
    assert info["cuda"] == "it was not asked for (CVG_BUILD=cpu)"


@pytest.mark.drawn(8, of="long tests")
def test_without_a_compiler_auto_is_pure_python_and_says_so(project, tools):
    for name in ("c++", "nvcc"):
        (tools / name).unlink()
    done, info, modules = build_in_place(project, tools, "auto")
    assert modules == []
    assert "no C++ compiler was found" in info["cpu"]
    assert "found at build time" in info["cuda"]
    assert "cvg-kernels: no native cpu module: no C++ compiler was found" in done.stdout
    assert build_in_place(project, tools, "cpu", check=False)[0].returncode != 0


def test_none_builds_nothing_in_place(project, tools, gpu):
    _, info, modules = build_in_place(project, tools, "none", FAKE_CUDA="works")
    assert modules == []
    assert info["cpu"] == info["cuda"] == "it was not asked for (CVG_BUILD=none)"


def test_without_cmake_auto_says_so(project, tools):
    (tools / "cmake").unlink()
    _, info, _ = build_in_place(project, tools, "auto")
    assert info["cpu"] == "cmake was not found at build time"


def test_an_unknown_mode_is_refused(project, tools):
    done, _, _ = build_in_place(project, tools, "gpu", check=False)
    assert done.returncode != 0
    assert "CVG_BUILD must be one of auto, cpu, cuda, none; got 'gpu'" in done.stdout


def wheel_of(project, folder, **environment):
    run(
        ["-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)],
        project,
        **environment,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.drawn(8, of="long tests")
def test_wheel_holds_the_module_and_the_reason(project, tools, tmp_path_factory):
    # what an earlier build in place left behind must not come along
    (project / "cvg_kernels" / "_native_cuda.so").touch()
    (project / "cvg_kernels" / "_build_info.json").write_text('{"cuda": null}')
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    wheel = wheel_of(project, tmp_path_factory.mktemp("wheel"), PATH=path, CVG_BUILD="auto")
    assert "-none-any" not in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if "dist-info" not in name]
        info = json.loads(archive.read("cvg_kernels/_build_info.json"))
    assert sorted(names) == ["cvg_kernels/__init__.py", "cvg_kernels/_build_info.json", "cvg_kernels/_native_cpu.so"]
    assert info["cuda"] is not None


@pytest.mark.drawn(8, of="long tests")
def test_wheel_holds_nothing_of_an_earlier_build(project, tmp_path_factory):
    stale = project / "build" / "lib" / "cvg_kernels" / "removed_since.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    wheel = wheel_of(project, tmp_path_factory.mktemp("wheel"), CVG_BUILD="none")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if "dist-info" not in name]
    assert sorted(names) == ["cvg_kernels/__init__.py", "cvg_kernels/_build_info.json"]


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """The real tree without what builds leave in it."""
    folder = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(
        ROOT,
        folder,
        ignore=shutil.ignore_patterns(
            ".git", ".venv", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache"
        ),
    )
    return folder


def assert_definitions(folder, prepare, where):
    """The definitions are `cvg_kernels.reference`, from below `where`, and no top-level package, after `prepare`."""
    code = (
        "import importlib.util, site, sys\n"
        # -S: no finder of an editable install that this environment has
        f"sys.path += {[path for path in sys.path if path.endswith('site-packages')]!r}\n"
        f"{prepare}\n"
        "import torch, cvg_kernels as cvg\n"
        "from cvg_kernels.reference import coupled_max_flow, path_flow\n"
        "a = torch.rand(1, 3, 3)\n"
        "cvg.min_max_matmul(a, a, backend='reference')\n"
        "assert importlib.util.find_spec('python_ref') is None\n"
        "print(path_flow.__name__, path_flow.__file__)"
    )
    name, file = run(["-S", "-c", code], folder, PYTHONPATH="").stdout.split()
    assert name == "cvg_kernels.reference.path_flow"
    assert where in Path(file).parents


@pytest.mark.drawn(8, of="long tests")
def test_an_editable_install_has_the_definitions_inside_the_package(source_tree, tmp_path):
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    run([*install, "--prefix", str(tmp_path / "prefix"), "-e", str(source_tree)], tmp_path, CVG_BUILD="none")
    (site,) = (tmp_path / "prefix").glob("**/site-packages")
    # First on the path: the finder of this environment's own editable install has the same name.
    prepare = f"sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r})"
    assert_definitions(tmp_path, prepare, source_tree / "python_ref")


@pytest.mark.drawn(8, of="long tests")
def test_a_checkout_that_is_not_installed_has_the_definitions_inside_the_package(source_tree, tmp_path):
    # By its root `python_ref` could be imported as well, so the package alone is on the path.
    (tmp_path / "cvg_kernels").symlink_to(source_tree / "cvg_kernels")
    assert_definitions(tmp_path, f"sys.path.insert(0, {str(tmp_path)!r})", source_tree / "python_ref")


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.slow
def test_sdist_builds_the_same_wheel(source_tree, tmp_path):
    make_sdist = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
    run(["-c", make_sdist, str(tmp_path)], source_tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()

    needed = [*PACKAGED, *(p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    assert not [str(name) for name in needed if not (unpacked / name).exists()]

    contents = []
    for number, tree in enumerate((source_tree, unpacked)):
        wheel = wheel_of(tree, tmp_path / f"wheel{number}", CVG_BUILD="none")
        assert wheel.name.endswith("-py3-none-any.whl")
        with zipfile.ZipFile(wheel) as archive:
            contents.append({n: archive.read(n) for n in archive.namelist() if "RECORD" not in n})
    assert contents[0].keys() == contents[1].keys()
    assert contents[0] == contents[1]

    names = contents[0]
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "cvg_kernels").rglob("*.py")}
    modules |= {f"cvg_kernels/reference/{p.name}" for p in (ROOT / "python_ref").glob("*.py")}
    assert modules <= set(names)
    assert names["cvg_kernels/reference/__init__.py"] == (ROOT / "python_ref" / "__init__.py").read_bytes()
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == {"cvg_kernels"}
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert_definitions(tmp_path, f"sys.path.insert(0, {str(tmp_path / 'site')!r})", tmp_path / "site")
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/")) or n.endswith(".so")]
    assert any(n.endswith(".safetensors") for n in names), "the shapes model is not in the wheel"
    stored = json.loads(names["cvg_kernels/_build_info.json"])
    assert stored["cpu"] == stored["cuda"] == "it was not asked for (CVG_BUILD=none)"


#: A compiler that takes the object file of the same name from an earlier build, where there is one.
QUICK_COMPILER = """#!/bin/bash
for word in "$@"; do
    [ "$last" = -o ] && object="$word"
    [ "$last" = -MF ] && needed="$word"
    last="$word"
done
for built in "{build}"/temp*/cpu/"$object"; do
    if [[ "$object" == *.o && -f "$built" ]]; then
        [ -z "$needed" ] || echo "$object:" > "$needed"
        exec cp "$built" "$object"
    fi
done
exec "{compiler}" "$@" -O0
"""


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler on this machine")
def test_installed_wheel_runs_its_cpu_module(source_tree, tmp_path):
    """What the checkout's build compiled is taken from there, and the rest compiled without optimisation: how files
    come into the wheel and load is what is tested, and it takes seconds instead of minutes."""
    compiler = tmp_path / "quick-c++"
    compiler.write_text(QUICK_COMPILER.format(build=ROOT / "build", compiler=shutil.which("c++")))
    compiler.chmod(0o755)
    built = [cache.read_text() for cache in ROOT.glob("build/temp*/cpu/CMakeCache.txt")]
    levels = "all" if any("CVG_CPU_LEVELS:STRING=all" in cache for cache in built) else "native"
    wheel = wheel_of(source_tree, tmp_path / "wheel", CVG_BUILD="cpu", CVG_CPU_LEVELS=levels, CXX=str(compiler))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    said = run(
        [
            "-c",
            "import torch, cvg_kernels as cvg; q = torch.randn(1, 2, 5, 8)\n"
            "native = cvg.attention_with_capture(q, q, q, [0], backend='native')\n"
            "torch.testing.assert_close(native, cvg.attention_with_capture(q, q, q, [0], backend='reference'))\n"
            "print(cvg.__file__, native.maps.shape)",
        ],
        tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
    ).stdout
    assert str(tmp_path / "site") in said


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_what_was_built_loads(target):
    stored = Path(cvg_kernels.__file__).with_name("_build_info.json")
    if not stored.exists():
        pytest.skip("a source tree that was never built")
    built = json.loads(stored.read_text())[target]
    assert (native.reason(target) is None) == (built is None), native.reason(target)
