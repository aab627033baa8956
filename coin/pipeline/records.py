"""Resumable steps: a step is repeated only if its inputs have changed.

The points of a sweep share steps: outputs that another point has made with the same key, a hash of all inputs, are
linked.
"""

import contextlib
import glob
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coin.core.versions import versions
from coin.files.atomic import link_file, sha256_of, write_text
from coin.pipeline.options import config_dict
from coin.pipeline.step import Step
from coin.reporting.sweeps import SWEEP_YAML


def sweep_of(experiment: Path) -> Path | None:
    """Return the folder of the sweep that an experiment belongs to, or None."""
    return experiment.parent if (experiment.parent / SWEEP_YAML).is_file() else None


@dataclass(frozen=True)
class Status:
    """A step's status: why it has to run ('' if it is up to date), and the seconds of its last run, if known."""

    why: str
    seconds: float | None = None

    @property
    def is_current(self) -> bool:
        """Whether the step's outputs are those of its options and inputs."""
        return not self.why


@dataclass(frozen=True)
class Inputs:
    """What a step's outputs depend on: its options as JSON, and the hashes of its input files by path."""

    options: Any
    files: Mapping[str, str]

    @property
    def key(self) -> str:
        """The hash of the options, of the files' contents in their order, and of coin's version."""
        value = [self.options, list(self.files.values()), versions()["coded-coin"]]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def inputs_of(step: Step) -> Inputs:
    """Return a step's inputs as they are now; paths are those from the experiment's folder.

    Raises FileError if a file is missing.
    """
    experiment = step.folder.parent
    paths = {path: path.relative_to(experiment) if path.is_relative_to(experiment) else path for path in step.inputs}
    return Inputs(config_dict(step.options), {str(name): sha256_of(path) for path, name in paths.items()})


def status_of(step: Step) -> Status:
    """Return whether the step's record has the key of its inputs, and its outputs are those recorded."""
    record = _read(step.folder, step.name)
    seconds = record["seconds"] if isinstance(record.get("seconds"), float) else None
    if gone := next((path for path in step.inputs if not path.is_file()), None):
        return Status(f"'{gone.name}' is not there yet", seconds)
    if not record:
        return Status("never done", seconds)
    inputs = inputs_of(step)
    if record["key"] != inputs.key:
        return Status(_difference(record.get("inputs"), inputs), seconds)
    for path in step.outputs:
        found = sha256_of(path) if path.is_file() else None
        if record["outputs"].get(str(path.relative_to(step.folder))) != found or found is None:
            return Status(f"'{path.name}' is {'missing' if found is None else 'not what was written'}", seconds)
    return Status("", seconds)


def _difference(before: Any, now: Inputs) -> str:
    """Return which options and input files have changed since a record was written."""
    if not isinstance(before, dict):
        return "its options or inputs have changed"
    options, wanted = (dict(_flat(found)) for found in (before.get("options", {}), now.options))
    changed = [name for name in sorted({*options, *wanted}) if options.get(name, ...) != wanted.get(name, ...)]
    files = before.get("files", {})
    changed += [Path(path).name for path, digest in now.files.items() if files.get(path) != digest]
    left_out = [f"without {Path(path).name}" for path in files if path not in now.files]
    if changed or left_out:
        return f"changed: {', '.join([*changed, *left_out])}"
    return "another order of its inputs" if list(files) != list(now.files) else "another version of coin"


def _flat(options: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield options by dotted name."""
    if isinstance(options, dict) and options:
        for key, value in options.items():
            yield from _flat(value, f"{name}.{key}" if name else key)
    else:
        yield name, options


def reused_status(step: Step) -> Status:
    """Return a step's status; outputs of a shared step that another point of the sweep has are linked first."""
    status = status_of(step)
    return status if status.is_current or not _reuse_from_sweep(step) else Status("", status.seconds)


def _reuse_from_sweep(step: Step) -> bool:
    """Link the outputs of another point of the sweep that has finished the step; return whether there is one."""
    sweep = sweep_of(step.folder.parent)
    if sweep is None or not step.shared or not all(path.is_file() for path in step.inputs):
        return False
    inputs = inputs_of(step)
    for path in sorted(sweep.glob(f"*/{glob.escape(step.folder.name)}/.steps/{glob.escape(step.name)}.json")):
        folder = path.parent.parent
        theirs = [folder / output.relative_to(step.folder) for output in step.outputs]
        record = _read(folder, step.name)
        there = record.get("key") == inputs.key and all(each.is_file() for each in theirs)
        if there and record["outputs"] == _contents(folder, theirs):
            with contextlib.suppress(OSError):  # it is just being made again: the step is done here
                for source, target in zip(theirs, step.outputs, strict=True):
                    link_file(source, target)
                record_step(step, inputs)
                return True
    return False


def record_step(step: Step, inputs: Inputs, seconds: float | None = None) -> None:
    """Record that the step is finished, with its inputs as they were when it began and the seconds that it took."""
    record = {
        "key": inputs.key,
        "outputs": _contents(step.folder, step.outputs),
        "inputs": {"options": inputs.options, "files": inputs.files},
        "seconds": seconds,
    }
    write_text(step.folder / ".steps" / f"{step.name}.json", json.dumps(record, indent=1))


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Return a step's record; empty if there is none, or it is damaged."""
    try:
        record = json.loads((folder / ".steps" / f"{name}.json").read_text(encoding="utf-8"))
        return record if isinstance(record["key"], str) and isinstance(record["outputs"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _contents(folder: Path, outputs: Sequence[Path]) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in outputs}
