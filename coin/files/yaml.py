"""Reading a user's YAML files, with errors in one line."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from coin.errors import ConfigurationError, FileError

_MOST_VALUES = 100_000  # an alias within an alias within … can stand for any number of values


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds; a FileError where it cannot be read, a ConfigurationError where it is no YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "no text")
        raise FileError(f"cannot read '{path}' ({reason}), expected a YAML file in UTF-8; check the path") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and _count(root, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"found more than {_MOST_VALUES} values with all aliases written out")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError is of a date that is none
        problem = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise ConfigurationError(f"cannot use '{path}' as YAML: {problem}; mend that line") from error


def as_text(value: Any) -> str:
    """Return a value as a command line or a table holds it: text as it stands, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _count(node: yaml.Node, counts: dict[yaml.Node, float]) -> float:
    """Return for how many values a node stands, all aliases written out; refuse keys that are given twice."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if node not in counts:
        counts[node] = math.inf  # of an alias of a node within itself
        entries = node.value
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    raise yaml.MarkedYAMLError(problem=f"found key '{key.value}' twice", problem_mark=key.start_mark)
                keys.add(str(key.value))
            entries = itertools.chain.from_iterable(node.value)
        counts[node] = 1 + sum(_count(entry, counts) for entry in entries)
    return counts[node]
