"""A sweep file and the points it stands for: pure functions, nothing is run here."""

import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from coin.errors import ConfigurationError
from coin.files.atomic import is_folder_name
from coin.files.yaml import read_yaml

_KEYS = {"program", "command", "method", "metric", "parameters", "name", "description", "project", "entity"}
_AGENT_KEYS = {"run_cap", "early_terminate", "controller", "settings", "apiVersion", "kind"}
_ARGUMENTS = "${args}"
_RESERVED = ("name", "output")
_PARAMETER_KEYS = {"values", "value", "probabilities", "min", "max", "distribution"}
_NAME_LENGTH = 60


@dataclass(frozen=True)
class SweepFile:
    """What a sweep file says.

    Args:
        name: The sweep's name: its folder is ``output/name``.
        method: ``grid`` or ``random``.
        command: The arguments of ``coin run``, with ``${args}`` where a point's own go.
        parameters: By dotted key of the experiment file, what it takes: ``value``, ``values``, or ``min`` and ``max``.
        run_cap: At most so many points; none for no limit.
        text: The file itself, its name in it.
    """

    name: str
    method: str
    command: tuple[str, ...]
    parameters: Mapping[str, Mapping[str, Any]]
    run_cap: int | None = None
    text: str = ""


@dataclass(frozen=True)
class SweepPoint:
    """One point of a sweep: one experiment.

    Args:
        name: The experiment's name, ``<sweep>-<index>-<short description>``.
        values: The swept keys' values; constants of the sweep are not among them.
        arguments: The arguments of ``coin run``.
    """

    name: str
    values: Mapping[str, Any]
    arguments: tuple[str, ...]


def read_sweep(path: Path) -> SweepFile:
    """Read a sweep file in the format of W&B's sweeps.

    Raises:
        FileError: The file is missing or no text.
        ConfigurationError: It is no sweep of ``coin run`` that can be expanded here.
    """
    text = read_yaml(path)
    try:
        document = yaml.safe_load(text)
        json.dumps(document)
    except (yaml.YAMLError, ValueError, TypeError) as error:  # such as a date, which no option takes
        raise ConfigurationError(
            f"found a value in '{path}' that no option takes ({' '.join(str(error).split())}); put it in quotes"
        ) from error
    if not isinstance(document, dict):
        raise ConfigurationError(f"found no keys in '{path}', expected a sweep with {', '.join(sorted(_KEYS))}")
    if unknown := [key for key in document if key not in _KEYS | _AGENT_KEYS]:
        raise ConfigurationError(f"found key '{unknown[0]}' in '{path}', expected {', '.join(sorted(_KEYS))}")
    name = document.get("name", path.stem)
    if not isinstance(name, str) or not is_folder_name(name):
        raise ConfigurationError(f"found name '{name}' in '{path}', expected a plain folder name without slashes")
    method = document.get("method")
    if not isinstance(method, str) or method not in ("grid", "random"):
        raise ConfigurationError(f"found method '{method}' in '{path}', expected grid or random")
    parameters = document.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise ConfigurationError(f"found no parameters in '{path}', expected dotted keys of an experiment")
    for key, parameter in parameters.items():
        if not isinstance(key, str):
            raise ConfigurationError(f"found parameter {key!r} in '{path}', expected a dotted key of an experiment")
        _check_parameter(key, parameter, method)
    cap = document.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or cap < 1):
        raise ConfigurationError(f"found run_cap {cap} in '{path}', expected a number of at least 1")
    command = _run_arguments(document.get("command"), str(document.get("program", "")), path)
    return SweepFile(name, method, command, parameters, cap, text if "name" in document else f"name: {name}\n{text}")


def sweep_points(sweep: SweepFile, folder: Path, count: int | None = None, seed: int = 0) -> list[SweepPoint]:
    """Expand a sweep.

    A grid is the Cartesian product in the file's order, the last parameter varying fastest. A random sweep draws
    points one by one, so that a larger `count` only adds points; a point that was drawn before is drawn anew.

    Args:
        sweep: The sweep.
        folder: The sweep's folder, in which each experiment gets its own.
        count: At most so many points; a random sweep needs it, here or as the file's ``run_cap``.
        seed: Of the draws.

    Raises:
        ConfigurationError: A random sweep has no count.
    """
    count = count if count is not None else sweep.run_cap
    if count is not None and count < 1:
        raise ConfigurationError(f"found count {count}, expected at least 1")
    if sweep.method == "random" and count is None:
        raise ConfigurationError("found no number of points for a random sweep, expected --count")
    drawn = _grid(sweep) if sweep.method == "grid" else _draws(sweep, seed, count or 1)
    return [_point(sweep, folder, index, values) for index, values in enumerate(itertools.islice(drawn, count))]


def as_text(value: Any) -> str:
    """Return a value as a command line or a table holds it: text as it stands, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _point(sweep: SweepFile, folder: Path, index: int, values: Mapping[str, Any]) -> SweepPoint:
    swept = {key: value for key, value in values.items() if "value" not in sweep.parameters[key]}
    description = "-".join(f"{key.rsplit('.')[-1]}-{_short(key, value, sweep)}" for key, value in swept.items())
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", description)[:_NAME_LENGTH].strip("._-")
    name = f"{sweep.name}-{index:03d}" + (f"-{plain}" if plain else "")
    own = [f"--{key}={as_text(value)}" for key, value in values.items()]
    own += [f"--name={name}", f"--output={folder}"]
    place = sweep.command.index(_ARGUMENTS)
    return SweepPoint(name, swept, (*sweep.command[:place], *own, *sweep.command[place + 1 :]))


def _short(key: str, value: Any, sweep: SweepFile) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None or isinstance(value, str | int):
        return as_text(value)
    if isinstance(value, list) and value and all(isinstance(entry, str | int | float) for entry in value):
        return "_".join(as_text(entry) for entry in value)
    # Nothing short says what a nested value is: its place in the file does.
    return str(sweep.parameters[key]["values"].index(value))


def _grid(sweep: SweepFile) -> Iterator[dict[str, Any]]:
    choices = [p["values"] if "values" in p else [p["value"]] for p in sweep.parameters.values()]
    for combination in itertools.product(*choices):
        yield dict(zip(sweep.parameters, combination, strict=True))


def _draws(sweep: SweepFile, seed: int, count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    seen = set()
    for _ in range(100 * count):  # a small space has fewer points than may be asked for
        values = {key: _drawn(parameter, draw) for key, parameter in sweep.parameters.items()}
        text = json.dumps(values)
        if text not in seen:
            seen.add(text)
            yield values


def _drawn(parameter: Mapping[str, Any], draw: random.Random) -> Any:
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return draw.choices(parameter["values"], parameter.get("probabilities"))[0]
    low, high = parameter["min"], parameter["max"]
    match _distribution(parameter):
        case "int_uniform":
            return draw.randint(low, high)
        case "log_uniform_values":
            return math.exp(draw.uniform(math.log(low), math.log(high)))
        case _:
            return draw.uniform(low, high)


def _distribution(parameter: Mapping[str, Any]) -> str:
    whole = isinstance(parameter["min"], int) and isinstance(parameter["max"], int)
    return str(parameter.get("distribution", "int_uniform" if whole else "uniform"))


def _check_parameter(key: str, parameter: Any, method: str) -> None:
    if key in _RESERVED:
        raise ConfigurationError(f"found parameter '{key}', which the sweep sets for every point; leave it out")
    if not isinstance(parameter, dict) or len({"value", "values", "min"} & parameter.keys()) != 1:
        raise ConfigurationError(
            f"found parameter '{key}' with {parameter}, expected one of values, value, or min and max; "
            "options inside a section are dotted keys, such as calibration.samples_per_task"
        )
    if unknown := sorted(parameter.keys() - _PARAMETER_KEYS):
        raise ConfigurationError(f"found '{unknown[0]}' in parameter '{key}', expected {', '.join(_PARAMETER_KEYS)}")
    if "values" in parameter:
        values, shares = parameter["values"], parameter.get("probabilities")
        if not isinstance(values, list) or not values:
            raise ConfigurationError(f"found values {values} of parameter '{key}', expected a list of at least one")
        if shares is not None and not _are_shares(shares, len(values)):
            raise ConfigurationError(
                f"found probabilities {shares} of parameter '{key}', expected one for each of its {len(values)} "
                "values, with sum 1"
            )
    if "min" in parameter:
        _check_range(key, parameter, method)


def _are_shares(shares: Any, count: int) -> bool:
    numbers = isinstance(shares, list) and all(isinstance(share, int | float) and share >= 0 for share in shares)
    return numbers and len(shares) == count and math.isclose(sum(shares), 1, abs_tol=1e-6)


def _check_range(key: str, parameter: Mapping[str, Any], method: str) -> None:
    if method == "grid":
        raise ConfigurationError(f"found parameter '{key}' with min and max in a grid, expected values; or use random")
    low, high = parameter["min"], parameter.get("max")
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high)) or low >= high:
        raise ConfigurationError(
            f"found min {low!r} and max {high!r} of parameter '{key}', expected two increasing numbers "
            "(YAML reads 1e-3 as text: write 1.0e-3)"
        )
    distribution = _distribution(parameter)
    if distribution not in ("uniform", "int_uniform", "log_uniform_values"):
        raise ConfigurationError(
            f"found distribution '{distribution}' of parameter '{key}', expected uniform, int_uniform or "
            "log_uniform_values"
        )
    if distribution == "log_uniform_values" and low <= 0:
        raise ConfigurationError(f"found min {low} of parameter '{key}', expected more than 0 for log_uniform_values")
    if distribution == "int_uniform" and not (isinstance(low, int) and isinstance(high, int)):
        raise ConfigurationError(f"found min {low} and max {high} of parameter '{key}', expected whole numbers")


def _run_arguments(command: Any, program: str, path: Path) -> tuple[str, ...]:
    wanted = f"command: [coin, run, -c, EXPERIMENT.yaml, '{_ARGUMENTS}']"
    if not isinstance(command, list) or not all(isinstance(part, str | int | float) for part in command):
        raise ConfigurationError(f"found command {command} in '{path}', expected {wanted}")
    parts = [program if part == "${program}" else str(part) for part in command]
    if "run" not in parts or Path(parts[parts.index("run") - 1]).name != "coin" or parts[0] == "run":
        raise ConfigurationError(f"found a command in '{path}' that does not call 'coin run', expected {wanted}")
    arguments = parts[parts.index("run") + 1 :]
    if arguments.count(_ARGUMENTS) != 1:
        raise ConfigurationError(f"found a command in '{path}' without one {_ARGUMENTS}, expected {wanted}")
    return tuple(arguments)
