"""Reading a user's YAML files, with errors in one line."""

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from coin.errors import ConfigurationError, FileError


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses a key that is given twice: YAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        known: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in known:
                raise yaml.MarkedYAMLError(
                    problem=f"found key '{name}' twice", problem_mark=key.start_mark
                )
            known.add(name)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds; a FileError where it cannot be read, a ConfigurationError where it is no YAML."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    # A ValueError is of a date that is none, or no text.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = str(error).replace('"<unicode string>", ', "")
        raise ConfigurationError(
            f"cannot use '{path}' as YAML: {problem}; fix that line"
        ) from error
    except OSError as error:
        raise FileError(
            f"cannot read '{path}' ({error.strerror}), expected a YAML file; check the path"
        ) from error
