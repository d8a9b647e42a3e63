"""What a run records so that it can be repeated: versions, commit, machine, inputs."""

import hashlib
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def describe(problem: Any, rule: Any, weights: Tensor) -> dict[str, Any]:
    """The record of a run, as JSON can hold it."""
    return {
        "rule": repr(rule),
        "norm": rule.norm.name if hasattr(rule, "norm") else None,
        "objective": _objective(problem),
        "weights_sha256": digest(weights),
        "trajectories": weights.shape[0],
        "device": str(weights.device),
        "dtype": str(weights.dtype).removeprefix("torch."),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **software(),
        **machine(),
    }


def _objective(problem: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "type": type(problem).__name__,
        "size": problem.size,
        "degree": float(problem.degree),
    }
    for name in ("x", "y", "matrix", "minimiser"):
        value = getattr(problem, name, None)
        if isinstance(value, Tensor):
            record[name] = {"shape": list(value.shape), "sha256": digest(value)}
    if hasattr(problem, "net"):
        record |= {"net": type(problem.net).__name__, "loss": problem.loss.name}
        record["layout"] = {block.name: list(block.shape) for block in problem.layout}
    return record


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's numbers."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


@cache
def software() -> dict[str, Any]:
    """Versions of flowsim and of what computes."""
    import numpy

    from flowsim import __version__

    return {
        "flowsim": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def machine() -> dict[str, Any]:
    """The machine, in words, and the threads that torch uses on it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


@cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _commit() -> str | None:
    """The commit of the checkout that flowsim runs from, with "+" where it is modified; None
    outside of one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(here), *arguments]
        return subprocess.run(
            call, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # the checkout must be flowsim's own
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None
