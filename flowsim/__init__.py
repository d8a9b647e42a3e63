"""flowsim: steepest flow of neural networks in any norm.

The public names stand in ``__init__.pyi``, which type checkers read as it is; here they are
imported on first use, so that ``import flowsim`` and the command line start at once."""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any


def _listed(stub: str) -> dict[str, tuple[str, str]]:
    """Each public name with its module and what it is called there."""
    lines = (line for line in ast.parse(stub).body if isinstance(line, ast.ImportFrom))
    return {
        name.asname or name.name: (line.module or "", name.name)
        for line in lines
        for name in line.names
    }


_HOME = _listed(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("flowsim")
    if name not in _HOME:
        raise AttributeError(f"module 'flowsim' has no attribute {name!r}")
    module, original = _HOME[name]
    if module == "flowsim":
        return import_module(f"flowsim.{original}")
    home = import_module(module)
    # a module of a room, or a name of a module
    return getattr(home, original, None) or import_module(f"{module}.{original}")


def __dir__() -> list[str]:
    return __all__
