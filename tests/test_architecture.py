"""The house: imports point one way, public names exist, the numerical core stands alone."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import flowsim

PACKAGE = Path(flowsim.__file__).parent

# A module imports only from those before it.
ORDER = [
    "layout",
    "kernels",
    "nets",
    "faces",
    "norms",
    "matrix_norms",
    "block_norms",
    "polars",
    "losses",
    "kinks",
    "problem",
    "quadratics",
    "boxqp",
    "splitting",
    "velocity",
    "data",
    "reference",
    "closed_forms",
    "clocks",
    "state",
    "integrate",
    "odeint",
    "rosenbrock",
    "polytope",
    "spots",
    "pieces",
    "barriers",
    "balls",
    "interior",
    "movement",
    "net_movement",
    "implicit",
    "forces",
    "sliding",
    "flow",
    "schedules",
    "discrete",
    "frames",
    "momentum",
    "descent",
    "adaptive",
    "muon",
    "shampoo",
    "dissipation",
    "torch_optim",
    "minibatch",
    "constraints",
    "events",
    "switching",
    "margins",
    "stationarity",
    "multipliers",
    "certificate",
    "trajectory",
    "provenance",
    "simulation",
    "identities",
    "diagnostics",
    "branches",
    "limits",
    "paths",
    "comparison",
    "approach",
    "curves",
    "portraits",
    "beside",
    "plots",
    "rules",
    "experiment",
    "cli",
]
CORE = ORDER[: ORDER.index("diagnostics") + 1]


def imports(path: Path) -> list[str]:
    """Names of the flowsim modules that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flowsim":
            rest = (node.module or "").split(".")[1:]
            found += [rest[0]] if rest else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("flowsim.")]
    return [name for name in found if name != "__version__"]


def test_every_module_has_its_place():
    names = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"} | {"kernels"}
    assert names == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_upwards(name):
    files = sorted((PACKAGE / name).glob("*.py")) or [PACKAGE / f"{name}.py"]
    for path in files:
        later = [m for m in imports(path) if m != name and ORDER.index(m) > ORDER.index(name)]
        assert not later, f"{path.name} imports {later}"


def test_public_names_exist_and_are_those_that_type_checkers_see():
    for name in flowsim.__all__:
        assert getattr(flowsim, name) is not None
    assert set(flowsim.__all__) <= set(dir(flowsim))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = flowsim.nothing
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    typed = {alias.name for node in block.body for alias in node.names}
    assert typed == set(flowsim.__all__)


def test_public_things_are_documented():
    for name in flowsim.__all__:
        thing = getattr(flowsim, name)
        if callable(thing):
            assert thing.__doc__, name
    for name in ORDER:
        assert importlib.import_module(f"flowsim.{name}").__doc__, name


def test_the_core_imports_without_the_command_lines_libraries():
    blocked = ["click", "pydantic", "rich", "matplotlib", "sklearn", "h5py", "safetensors", "tomli_w"]
    code = (
        "import sys\n"
        f"for name in {blocked}: sys.modules[name] = None\n"
        f"for name in {CORE}: __import__(f'flowsim.{{name}}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_device_and_single_precision_are_words_of_kernels_and_configuration_only():
    for path in PACKAGE.glob("*.py"):
        if path.stem in ("experiment", "cli", "provenance"):
            continue
        text = path.read_text(encoding="utf-8")
        assert ".cuda(" not in text, path.name
        assert "float32" not in text, path.name


def test_no_global_settings():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for setting in ("set_default_dtype", "set_default_device", "os.environ", "manual_seed_all", "rcParams["):
            assert setting not in text, f"{path.name}: {setting}"
