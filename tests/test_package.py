"""The house: the public names are a list, layers import downwards only, importing does no work, and the wheel carries its data."""

import ast
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import optmem

ROOT = Path(optmem.__file__).parent
# Each layer may import from itself and from those before it (shared design: Layers).
LAYERS = [
    {"errors", "config", "files", "machine", "native", "items", "reference", "blockwise", "ops", "env", "interpreter"},
    {"text", "pages"},  # side by side: the vocabulary of our own model is the symbols of pages
    {"images", "pixels", "inputs"},
    {"model"},
    {"engine"},
    {"memory"},
    {"train"},
    {"memory_commands", "memory_input", "memory_output", "memory_report"},
    {"bench"},
    {"demo", "demo_report", "reading_commands", "reading_output", "testing", "cli", "__main__"},
]


def test_public_names():
    reading = {"Completion", "Engine", "Glanced", "VisionTokens", "document_text"}
    assert set(optmem.__all__) == {"Memory", "OptmemError", "Page", "paginate"} | reading
    assert all(hasattr(optmem, name) for name in optmem.__all__)


def test_names_of_memories():
    """What its functions take and give can be imported from one place, and brings no torch before it is asked for."""
    from optmem import memory

    assert set(memory.__all__) == {"Context", "Hit", "Memory", "Policy", "Receipt"} <= set(dir(memory))
    assert all(getattr(memory, name).__name__ == name for name in memory.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = memory.nonsense
    program = "import sys, optmem.memory.store; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"


def layer_of(module: str) -> int | None:
    head = module.split(".")[1] if "." in module else module
    return next((i for i, layer in enumerate(LAYERS) if head in layer), None)


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "optmem":
            yield from (f"optmem.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("optmem."):
            yield node.module


SOURCES = sorted(path for path in ROOT.rglob("*.py") if "kernels" not in path.parts and path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers_import_downwards(path):
    mine = layer_of("optmem." + path.relative_to(ROOT).parts[0].removesuffix(".py"))
    assert mine is not None, f"{path.name} is in no layer: add it to LAYERS"
    for module in imported(path):
        theirs = layer_of(module)
        if module.startswith("optmem.kernels"):
            assert path.parent.name == "ops", "only ops imports kernels"
        elif theirs is not None:
            assert theirs <= mine, f"{path.name} imports {module} from a later layer"


def test_errors_know_their_exit_code():
    from optmem import errors

    for error in vars(errors).values():
        if isinstance(error, type):
            assert issubclass(error, optmem.OptmemError)
            assert error.__doc__
            assert 0 < error.exit_code < 128


@pytest.mark.parametrize(
    ("modules", "absent"),
    [("optmem", "torch, numpy, PIL, click"), ("optmem, optmem.cli", "triton, transformers, pypdfium2, matplotlib")],
    ids=["package", "commands"],
)
def test_importing_does_no_work(modules, absent):
    program = f"import sys, {modules}; print(sorted(set('{absent}'.split(', ')) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_no_public_name_is_said_to_be_none():
    with pytest.raises(AttributeError, match="module 'optmem' has no attribute 'nonsense'"):
        _ = optmem.nonsense
    assert set(optmem.__all__) <= set(dir(optmem))


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "fonts/spleen-8x16.bdf",
        "fonts/DejaVuSans.ttf",
        "fonts/LICENSE-spleen",
        "fonts/LICENSE-dejavu",
        "samples/chat.json",
    ],
)
def test_data_travels_with_the_package(name):
    assert files("optmem").joinpath(name).is_file()
