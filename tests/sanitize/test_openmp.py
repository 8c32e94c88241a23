"""The stand-in for GNU's OpenMP, in which ThreadSanitizer sees what threads wait for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

STAND_IN = Path(__file__).with_name("openmp_by_threads.cpp")
#: What the kernels use: loops in turn and by shares, a barrier behind each, several regions; and, when asked, a race.
PROGRAM = """
int main(int argc, char**) {
  long total = 0, raced = 0;
  int seen[4] = {0, 0, 0, 0};
  for (int round = 0; round < 3; ++round) {
#pragma omp parallel num_threads(4)
    {
#pragma omp for schedule(dynamic, 1)
      for (int n = 0; n < 100; ++n) {
#pragma omp atomic
        total += n;
      }
#pragma omp for
      for (int n = 0; n < 4; ++n) seen[n] += 1;
#pragma omp for schedule(dynamic, 4)
      for (int n = 0; n < 10; ++n) {
#pragma omp atomic
        total += seen[n % 4];
      }
      if (argc > 1) raced += 1;
    }
  }
  return total == 3 * 4950 + 10 + 20 + 30 ? 0 : 1;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no GNU C++ compiler")
    folder = tmp_path_factory.mktemp("openmp")
    (folder / "program.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", "-fsanitize=thread"]
    objects = []
    for source, more in ((STAND_IN, []), (folder / "program.cpp", ["-fopenmp"])):
        objects.append(folder / f"{source.stem}.o")
        command = [compiler, *flags, *more, "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True)
    linked = subprocess.run([compiler, *flags, *objects, "-o", folder / "program"])
    if linked.returncode:
        pytest.skip("the compiler has no ThreadSanitizer")
    return folder / "program"


def test_what_is_right_is_right_and_no_race(program):
    ended = subprocess.run([program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_race_is_seen(program):
    ended = subprocess.run([program, "race"], capture_output=True, text=True)
    assert ended.returncode == 66 and "data race" in ended.stderr
