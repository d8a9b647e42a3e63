"""flowsim: steepest flow of neural networks in any norm.

The public names stand in ``__init__.pyi``, and are imported on first use, so that ``import
flowsim`` and the command line start at once."""

from typing import Any

from flowsim.lazy import attach

_imported, __dir__, __all__ = attach(__name__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("flowsim")
    return _imported(name)
