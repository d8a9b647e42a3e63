"""Public names, listed once in the stub ``__init__.pyi`` of a package, which type checkers read as
it is; here they are imported on first use."""

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The ``__getattr__``, ``__dir__`` and ``__all__`` of a package, by the list in its stub.

    Names there are those of other modules, or modules; ``import … as`` renames them."""
    homes = _listed(package)
    names = sorted(homes)

    def imported(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, original = homes[name]
        home = vars(import_module(module))
        if original in home:
            return home[original]
        return import_module(f"{module}.{original}")

    return imported, lambda: names, names


def _listed(package: str) -> dict[str, tuple[str, str]]:
    """Each public name with its module and what it is called there."""
    folder = Path(__file__).parents[1].joinpath(*package.split("."))
    stub = folder / "__init__.pyi"
    text = stub.read_text(encoding="utf-8")
    homes = {}
    for line in ast.parse(text).body:
        if not isinstance(line, ast.ImportFrom):
            continue
        for name in line.names:
            public = name.asname or name.name
            homes[public] = (line.module or "", name.name)
    return homes
