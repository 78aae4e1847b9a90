"""Every instruction set of this machine can be forced, and what cannot be had is refused by name."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmkernels import _library

ROOT = Path(__file__).parents[1]
# The flags of /proc/cpuinfo that each instruction set needs, from the least to the best.
NEEDS = {
    "generic": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512bf16": {
        "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16",
    },
    "amx": {
        "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16",
        "amx_tile", "amx_bf16", "amx_int8",
    },
}  # fmt: skip
FLAGS = set(Path("/proc/cpuinfo").read_text().split()) if platform.machine() == "x86_64" else set()
PRESENT = [isa for isa, flags in NEEDS.items() if flags <= FLAGS]
ABSENT = [isa for isa in NEEDS if isa not in PRESENT]

needs_library = pytest.mark.skipif(_library.native_error is not None, reason=str(_library.native_error))


def report(isa):
    """What a fresh process says of itself when LMKERNELS_CPU_ISA is `isa`: cpu_isa() or its error, then backends()."""
    program = (
        "from lmkernels import _library\n"
        "try: print(_library.cpu_isa())\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print(_library.backends()['native'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LMKERNELS_CPU_ISA": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.splitlines()


@needs_library
@pytest.mark.parametrize("isa", PRESENT)
def test_isa_can_be_forced(isa):
    assert report(isa) == [isa, "None"]


@needs_library
def test_best_isa_is_the_default():
    assert report("") == [PRESENT[-1], "None"]


@needs_library
def test_unknown_isa_is_refused():
    problem = (
        "LMKERNELS_CPU_ISA must be one of generic, avx2, avx512, avx512bf16, amx "
        f"(this CPU has {', '.join(PRESENT)}), got 'AVX2'"
    )
    assert report("AVX2") == [f"ValueError {problem}", problem]


@needs_library
@pytest.mark.parametrize("isa", ABSENT)
def test_absent_isa_is_refused(isa):
    problem = f"LMKERNELS_CPU_ISA must name an instruction set that this CPU has ({', '.join(PRESENT)}), got '{isa}'"
    assert report(isa) == [f"ValueError {problem}", problem]


@needs_library
@pytest.mark.parametrize("group", ["attention", "others"])
@pytest.mark.parametrize("isa", PRESENT)
def test_the_ops_pass_their_tests_on_every_instruction_set(isa, group, rerun):
    """Each file of tests/ops says in ON_EVERY_ISA which of its tests; this process's set has them already."""
    if isa == _library.cpu_isa():
        pytest.skip("the tests themselves run on it")
    rerun("--on-every-isa", group, LMKERNELS_CPU_ISA=isa)


def test_every_native_op_is_among_them():
    for path in ROOT.glob("lmkernels/ops/*/native.py"):
        assert "\nON_EVERY_ISA = " in (ROOT / f"tests/ops/test_{path.parent.name}.py").read_text()


MAIN = """
#include <cstdio>
#include <exception>
#include "isa.h"
int main() {
  try {
    std::puts(lmk::isa_name(lmk::isa()));
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 has more than one instruction set")
@pytest.mark.parametrize(
    "lacks, best",
    [("avx2", "generic"), ("fma", "generic"), ("avx512vl", "avx2"), ("avx512bf16", "avx512")],
)
def test_a_lesser_cpu_is_recognised(lacks, best, tmp_path):
    """isa.cpp on a CPU that has all but one feature: it takes what is left and refuses the rest."""
    (tmp_path / "main.cpp").write_text(MAIN)
    # string literals as macro arguments cannot be compared by the preprocessor, so the fake is a function
    (tmp_path / "fake.h").write_text(
        "#include <cstring>\n"
        f'inline bool fake_cpu_supports(const char* feature) {{ return std::strcmp(feature, "{lacks}") != 0; }}\n'
        "#define __builtin_cpu_supports fake_cpu_supports\n"
    )
    program = tmp_path / "main"
    sources = [tmp_path / "main.cpp", ROOT / "csrc/cpu/isa.cpp"]
    flags = ["-std=c++20", "-I", ROOT / "csrc/cpu", "-include", tmp_path / "fake.h"]
    subprocess.run(["c++", *flags, *sources, "-o", program], check=True)

    def run(isa):
        environment = {**os.environ, "LMKERNELS_CPU_ISA": isa}
        return subprocess.run([program], env=environment, capture_output=True, text=True, check=True).stdout.strip()

    names = list(NEEDS)
    left = ", ".join(names[: names.index(best) + 1])
    assert run("") == best
    for isa in names[names.index(best) + 1 :]:
        assert run(isa) == f"LMKERNELS_CPU_ISA must name an instruction set that this CPU has ({left}), got '{isa}'"
