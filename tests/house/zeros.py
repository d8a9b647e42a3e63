"""Does the test file of a module notice when the module's main function returns zeros?

    python tests/house/zeros.py [module …]     all modules, or those named, such as norms.vector

Each module's tests are run with its main function zeroed; a file that still passes is reported. The
main function is the longest public one, methods included. Minutes for all of them.
"""

import ast
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "flowsim"
PATIENCE = 300  # seconds for the tests of a module


def mirror_of(path: Path) -> Path:
    """The test file of a module's file."""
    inside = path.relative_to(PACKAGE)
    return ROOT / "tests" / inside.parent / f"test_{inside.name}"


def modules() -> Iterator[Path]:
    """Files of the package that define something."""
    return (path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py")


def main_function(path: Path) -> str | None:
    """The longest public function or method of a file, such as ``Norm.bind``; None where none
    returns anything."""
    found: dict[str, int] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = length(node)
        elif isinstance(node, ast.ClassDef):
            plain = [f for f in node.body if isinstance(f, ast.FunctionDef) and is_plain(f)]
            found |= {f"{node.name}.{f.name}": length(f) for f in plain}
    public = {name: size for name, size in found.items() if size and not is_private(name)}
    public = public or {name: size for name, size in found.items() if size}
    return max(public, key=lambda name: public[name], default=None)


def is_private(name: str) -> bool:
    return name.startswith("_") or "._" in name.replace(".__call__", "")


def is_plain(function: ast.FunctionDef) -> bool:
    """A method that can be replaced by setting it: no property, no static or class method."""
    return not function.decorator_list


def length(function: ast.FunctionDef) -> int:
    """Nodes of a function; 0 where it returns nothing that could be zero."""
    nodes = list(ast.walk(function))
    returned = [node.value for node in nodes if isinstance(node, ast.Return)]
    return len(nodes) if any(value is not None for value in returned) else 0


# ---------------------------------------------------------------------------------------------
# Inside pytest
# ---------------------------------------------------------------------------------------------


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--zero", help="module:function that is to return zeros")


def pytest_configure(config: Any) -> None:
    module, _, name = config.getoption("--zero").partition(":")
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, last)
    zeroed = returning_zeros(original)
    setattr(owner, last, zeroed)
    for other in [m for n, m in sys.modules.items() if n.startswith("flowsim")]:
        for alias in [n for n, thing in vars(other).items() if thing is original]:
            setattr(other, alias, zeroed)


def returning_zeros(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def zeroed(*args: Any, **options: Any) -> Any:
        return zeros(function(*args, **options))

    return zeroed


def zeros(value: Any) -> Any:
    """The same thing with every number in it zero."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, np.ndarray | np.generic):
        return np.zeros_like(value)
    if isinstance(value, bool | int | float | str):
        return type(value)()
    if isinstance(value, dict):
        return {key: zeros(child) for key, child in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(zeros, value))
    if isinstance(value, tuple | list):
        return type(value)(map(zeros, value))
    if is_dataclass(value) and not isinstance(value, type):
        copy = object.__new__(type(value))
        for field in fields(value):
            object.__setattr__(copy, field.name, zeros(getattr(value, field.name)))
        return copy
    return returning_zeros(value) if callable(value) and not isinstance(value, type) else None


# ---------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------


def notices(path: Path, name: str) -> bool:
    """Whether the tests of a module fail with this function zeroed."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    tests = str(mirror_of(path).relative_to(ROOT))
    zeroed = ["-p", "tests.house.zeros", "--zero", f"{module}:{name}"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *zeroed, tests]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return True  # what goes on for ever has been noticed as well
    if done.returncode > 2:  # neither passed, nor failed, nor failed to be collected
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.returncode != 0


def main(wanted: list[str]) -> int:
    missed = 0
    for path in modules():
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        name = main_function(path)
        if name is None or (wanted and module not in wanted):
            continue
        seen = mirror_of(path).exists() and notices(path, name)
        missed += not seen
        sys.stdout.write(f"{'noticed' if seen else 'MISSED'}  {module}:{name}\n")
        sys.stdout.flush()
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
