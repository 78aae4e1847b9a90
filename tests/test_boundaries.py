"""What may know what: kernels nothing of torch, the library nothing of Python, backends nothing of each other."""

import ast
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

import lmkernels

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lmkernels"
LIBRARY = PACKAGE / "_C.so"

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="lmkernels/_C.so is not built")


def needs_program(name):
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")


# --- the C++ side


def test_kernel_files_include_no_torch():
    kernels = [path for path in (ROOT / "csrc/cpu").iterdir() if path.name != "bindings.cpp"]
    assert kernels
    includes = [
        (path.name, header)
        for path in kernels
        for header in re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text())
    ]
    assert [found for found in includes if re.match(r"(torch|ATen|c10|pybind11|Python\.h)\b", found[1])] == []


@needs_library
@needs_program("nm")
def test_library_asks_for_the_stable_abi_only():
    """Undefined symbols are C functions of torch, and the C and C++ standard libraries: no C++ of torch, no Python."""
    listing = subprocess.run(["nm", "-DC", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    symbols = [line.split(maxsplit=1)[1] for line in listing.stdout.splitlines()]
    assert any(symbol.startswith("torch_library_impl") for symbol in symbols)
    assert [symbol for symbol in symbols if re.search(r"\b(at|c10|torch|caffe2|pybind11)::|^_?Py", symbol)] == []


INSTRUCTION = re.compile(r"^\s+[0-9a-f]+:\t(\S+)\s*([^<#]*)")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")


@cache
def disassembly():
    """[(function, mnemonic, operands)] of the compiled library, each different one once."""
    command = ["objdump", "-dC", "--no-show-raw-insn", LIBRARY]
    found, function = set(), ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if match := INSTRUCTION.match(line):
                found.add((function, match[1], match[2].strip()))
            elif match := FUNCTION.match(line):
                function = match[1]
    assert process.returncode == 0
    return sorted(found)


def isa_of(function):
    """The instruction set in whose namespace a function lives; what is in none must run on every CPU."""
    match = re.search(r"\blmk::(generic|avx2|avx512bf16|avx512|amx)::", function)
    return match[1] if match else "generic"


def is_avx(mnemonic, operands):
    # every VEX and EVEX mnemonic begins with v but for the mask registers' and BMI's, and these name their registers
    return re.match(r"v(?!er[rw]\b)", mnemonic) is not None or re.search(r"%([yz]mm|k[0-7])", operands) is not None


def is_avx512(mnemonic, operands):
    return re.search(r"%(zmm|k[0-7]|[xy]mm(1[6-9]|2\d|3[01]))", operands) is not None


X86_ONLY = pytest.mark.skipif("x86" not in subprocess.getoutput("uname -m"), reason="only x86 has AVX")


@needs_library
@needs_program("objdump")
@X86_ONLY
def test_avx_stays_in_its_namespace():
    """Code for the baseline CPU, the standard library's templates included, holds no AVX instruction; and so on up."""
    allowed = {
        "generic": lambda mnemonic, operands: not is_avx(mnemonic, operands),
        "avx2": lambda mnemonic, operands: not is_avx512(mnemonic, operands),
        "avx512": lambda mnemonic, operands: mnemonic != "vdpbf16ps",
        "avx512bf16": lambda mnemonic, operands: "%tmm" not in operands,
        "amx": lambda mnemonic, operands: True,
    }
    assert [line for line in disassembly() if not allowed[isa_of(line[0])](*line[1:])] == []


@needs_library
@needs_program("objdump")
@X86_ONLY
def test_every_isa_uses_what_it_has():
    """The test above means something: each namespace holds code that only its CPU can run."""

    def instructions(isa):
        return [line[1:] for line in disassembly() if isa_of(line[0]) == isa]

    assert any("%ymm" in operands for _, operands in instructions("avx2"))
    assert any("%zmm" in operands for _, operands in instructions("avx512"))
    assert any(mnemonic == "vdpbf16ps" for mnemonic, _ in instructions("avx512bf16"))
    assert any(mnemonic == "tdpbf16ps" for mnemonic, _ in instructions("amx"))


# --- the Python side


def modules():
    """{dotted name: path} of the package."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(name, path):
    """Absolute names of what a module imports anywhere in its text: modules, and names out of modules."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


GRAPH = {name: set(imports(name, path)) for name, path in modules().items()}


def importers(pattern, of):
    """[(module, what it imports)] where the module matches `pattern` and what it imports matches `of`."""
    return [
        (name, target)
        for name, targets in GRAPH.items()
        for target in sorted(targets)
        if re.match(pattern, name) and re.match(of, target)
    ]


def test_import_graph_is_read_correctly():
    assert "lmkernels._library.backends" in GRAPH["lmkernels"]
    assert any(name.endswith(".api") for name in GRAPH)


@pytest.mark.parametrize("name", ["reference", "native", "triton", "triton_kernels"])
def test_backends_import_neither_each_other_nor_the_api(name):
    others = "|".join({"reference", "native", "triton", "api"} - {name.removesuffix("_kernels")})
    assert importers(rf"lmkernels\.ops\.\w+\.{name}$", rf"lmkernels\.ops\.\w+\.({others})\b") == []


# from the bottom up; hf, nn and models stand side by side on ops
LAYERS = ["ops", "nn|models|generation|hf", "training", "cli|demo|_doctor"]


@pytest.mark.parametrize("level", range(len(LAYERS) - 1))
def test_lower_layers_do_not_import_higher_ones(level):
    above = "|".join(LAYERS[level + 1 :])
    assert importers(rf"lmkernels\.({LAYERS[level]})\b", rf"lmkernels\.({above})\b") == []


def test_package_never_imports_transformers():
    assert importers(r"lmkernels(?!\.hf\b)", r"transformers\b") == []


def test_triton_is_imported_by_its_backends_only():
    allowed = r"\.ops\.(\w+\.)?_?triton(_kernels|_interpreter|_autotune)?$|\.testing\.compiled$"
    assert importers(rf"lmkernels(?!{allowed})", r"triton\b") == []


def test_public_names_exist():
    assert sorted(lmkernels.__all__) == lmkernels.__all__
    assert [name for name in lmkernels.__all__ if not hasattr(lmkernels, name)] == []
