"""The house: imports point one way, public names exist, the numerical core stands alone."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import flowsim

PACKAGE = Path(flowsim.__file__).parent
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
MODULES = sorted(m.name for m in pkgutil.walk_packages(flowsim.__path__, "flowsim."))

# A room imports only from those further down; rooms on one line are blind to each other.
ROOMS = [
    {"experiment"},
    {"plots"},
    {"study"},
    {"run"},
    {"descent", "diagnostics"},
    {"flow"},
    {"exact"},
    {"motion"},
    {"velocity"},
    {"convex"},
    {"problems"},
    {"norms", "nets"},
    {"kernels"},
    {"checks", "layout", "lazy", "numerics"},
]
FLOOR = {room: number for number, floor in enumerate(ROOMS) for room in floor}
CORE = [m for m in MODULES if FLOOR[m.split(".")[1]] >= FLOOR["diagnostics"]]


def room(path: Path) -> str:
    """The room of a file: a folder, or a file that lies on the ground."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flowsim":
            rest = (node.module or "").split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names if alias.name.startswith("flowsim."))
            found |= {name.split(".")[1] for name in names}
    return found - {"__version__"}


def test_every_room_has_its_floor():
    assert {room(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path):
    here = room(path)
    wrong = {other for other in imported(path) - {here} if FLOOR[other] <= FLOOR[here]}
    assert not wrong, f"{path.name} imports from {sorted(wrong)}"


def test_public_names_exist():
    for name in flowsim.__all__:
        assert getattr(flowsim, name) is not None
    assert set(flowsim.__all__) <= set(dir(flowsim))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = flowsim.nothing


def test_public_things_are_documented():
    for name in flowsim.__all__:
        thing = getattr(flowsim, name)
        if callable(thing):
            assert thing.__doc__, name
    for name in MODULES:
        assert importlib.import_module(name).__doc__, name


def test_the_core_imports_without_the_command_lines_libraries():
    blocked = [
        "click",
        "pydantic",
        "rich",
        "matplotlib",
        "sklearn",
        "h5py",
        "safetensors",
        "tomli_w",
    ]
    code = (
        "import sys\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        f"for name in {CORE}: __import__(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_device_and_single_precision_are_words_of_kernels_and_configuration_only():
    for path in FILES:
        if room(path) == "experiment" or path.stem == "provenance":
            continue
        text = path.read_text(encoding="utf-8")
        assert ".cuda(" not in text, path.name
        assert "float32" not in text, path.name


def test_no_global_settings():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for setting in (
            "set_default_dtype",
            "set_default_device",
            "os.environ",
            "manual_seed_all",
            "rcParams[",
        ):
            assert setting not in text, f"{path.name}: {setting}"
