"""Where trajectories have been: named values at the save points, the final state, and how they came
about.

On disk a run is one directory: ``trajectory.nc`` (HDF5 with dimension scales, opens as NetCDF-4),
``run.json`` (status, certificate and provenance) and ``checkpoints/state.safetensors`` (all that a
resume needs). Nothing in it executes on loading, and every file is written beside its place and
moved into it."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowsim.diagnostics.certificate import Certificate
from flowsim.motion.state import State, Status

_STATE = Path("checkpoints") / "state.safetensors"


_EVENTS = "events"  # the group of the values file that holds them


@dataclass(frozen=True, repr=False)
class Trajectory:
    """Values ``(K, B, …)`` at K save points of B trajectories; NaN after a trajectory has stopped.

    ``run["lam"]`` is the value by name; the names are ``run.names``: the readings of the clocks,
    tallies as ``tally_…``, and what was observed. ``weights`` is ``(K, B, P)``, or None where that
    was too large to keep. ``clock`` names the reading that the save points are laid out on.

    ``run.events["separated"]["lam"]`` is Λ where each trajectory came to that event, NaN where it
    did not; there are all readings, and ``"value"``, what was measured there. Each is ``(B,)``.

    ``run.certificate`` says how far the run can be trusted; its ``verdict`` is a sentence.
    """

    values: dict[str, np.ndarray]
    weights: np.ndarray | None
    final: State
    label: str
    clock: str
    provenance: dict[str, Any]
    certificate: Certificate
    events: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        title, *lines = (escape(line) for line in self._lines())
        return "<br>".join([f"<b>{title}</b>", *lines])

    def _lines(self) -> list[str]:
        """What there is, without the numbers."""
        saves = max((len(value) for value in self.values.values()), default=0)
        stops = [f"{n} × {s.name}: {s.sentence}" for s, n in Counter(self.statuses).items()]
        title = f"{self.label}: {len(self)} trajectories, {saves} saves by {self.clock}"
        return [title, *stops, f"values: {', '.join(self.names)}"]

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self.values[name]
        except KeyError:
            raise KeyError(
                f"no value {name!r} in this trajectory; it has {', '.join(self.names)}"
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self.values

    @property
    def names(self) -> list[str]:
        return list(self.values)

    @property
    def statuses(self) -> list[Status]:
        """Why each trajectory stopped."""
        return self.final.statuses

    def __len__(self) -> int:
        """B, the number of trajectories."""
        return self.final.w.shape[0]

    def select(self, trajectories: int | Iterable[int]) -> "Trajectory":
        """Some of the trajectories, by index."""
        rows = [trajectories] if isinstance(trajectories, int) else list(trajectories)
        return replace(
            self,
            values={name: value[:, rows] for name, value in self.values.items()},
            weights=None if self.weights is None else self.weights[:, rows],
            final=self.final.select(torch.tensor(rows, device=self.final.w.device)),
            certificate=self.certificate.select(rows),
            events={
                name: {k: v[rows] for k, v in found.items()} for name, found in self.events.items()
            },
        )

    def save(self, directory: str | Path) -> Path:
        """Write the run directory; returns its path."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        save_state(self.final, path)
        _replacing(path / "trajectory.nc", self._write_values)
        record = {
            "label": self.label,
            "clock": self.clock,
            "status": [{"name": s.name, "sentence": s.sentence} for s in self.statuses],
            "certificate": self.certificate.record(),
            "provenance": self.provenance,
        }
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        _replacing(path / "run.json", lambda file: file.write_text(text, encoding="utf-8"))
        return path

    def _write_values(self, path: Path) -> None:
        import h5py

        arrays = dict(self.values)
        if self.weights is not None:
            arrays["weights"] = self.weights
        with h5py.File(path, "w", track_order=True) as file:
            for name, array in arrays.items():
                data = file.create_dataset(name, data=array)
                for axis, length in enumerate(array.shape):
                    data.dims[axis].attach_scale(_scale(file, name, axis, length))
            events = file.create_group(_EVENTS, track_order=True)
            for name, found in self.events.items():
                group = events.create_group(name, track_order=True)
                for key, array in found.items():
                    data = group.create_dataset(key, data=array)
                    data.dims[0].attach_scale(file["trajectory"])


def _scale(file: Any, name: str, axis: int, length: int) -> Any:
    """The dimension of an array's axis: saves, trajectories, then one of the array's own."""
    title = ("save", "trajectory")[axis] if axis < 2 else f"{name}_{axis}"
    if title not in file:
        file.create_dataset(title, data=np.arange(length)).make_scale(title)
    return file[title]


def load(directory: str | Path) -> Trajectory:
    """The run that `Trajectory.save` wrote. Resume it with ``simulate(problem, rule, load(…).final,
    until=…)``."""
    import h5py

    path = Path(directory)
    if not (path / "run.json").is_file():
        raise FileNotFoundError(
            f"load: {path} holds no run.json; expected a directory that Trajectory.save wrote"
        )
    record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    with h5py.File(path / "trajectory.nc", "r") as file:
        groups = {name: group for name, group in file.items() if isinstance(group, h5py.Group)}
        values = {
            name: data[()]
            for name, data in file.items()
            if name not in groups and not data.is_scale
        }
        events = {
            name: {k: v[()] for k, v in found.items()}
            for name, found in groups.get(_EVENTS, {}).items()
        }
    final = load_state(path)
    known = record.get("certificate")
    return Trajectory(
        values=values,
        weights=values.pop("weights", None),
        final=final,
        label=record["label"],
        clock=record["clock"],
        provenance=record["provenance"],
        certificate=Certificate.read(known)
        if known
        else Certificate.unknown(len(final.w), "saved without one"),
        events=events,
    )


def save_state(state: State, directory: Path) -> None:
    """Write a state as the run directory's checkpoint."""
    from safetensors.torch import save_file

    (directory / _STATE).parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.tensors().items()
    }
    _replacing(directory / _STATE, lambda file: save_file(tensors, file))


def load_state(directory: str | Path) -> State:
    """The state of a run directory's checkpoint, also of a run that was killed."""
    from safetensors.torch import load_file

    tensors = load_file(Path(directory) / _STATE)
    # to memory of their own: in that of the file they are not aligned, and BLAS rounds by that
    return State.from_tensors({name: tensor.clone() for name, tensor in tensors.items()})


def _replacing(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside ``path``, then move there, so that a kill never leaves half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
