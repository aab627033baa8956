"""A user's YAML files: what is wrong with them is said in one line, before anything is made of them."""

from pathlib import Path

import yaml  # type: ignore[import-untyped]

from coin.errors import ConfigurationError, FileError

_MOST_VALUES = 100_000
"""An alias within an alias within … can stand for any number of values."""


def read_yaml(path: Path) -> str:
    """Return the text of a YAML file whose keys all differ.

    Raises:
        FileError: The file is missing, or is no text.
        ConfigurationError: It is no YAML, has a key twice, or stands for more values than any configuration has.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileError(f"found no file '{path}', expected a YAML file; check the path") from error
    except IsADirectoryError as error:
        raise FileError(f"found a folder '{path}', expected a YAML file; name the file in it") from error
    except OSError as error:
        raise FileError(f"cannot read '{path}' ({error.strerror}), expected a YAML file; check the path") from error
    except UnicodeDecodeError as error:
        raise FileError(f"found no text in '{path}', expected a YAML file in UTF-8; check the path") from error
    try:
        document = yaml.compose(text, Loader=yaml.SafeLoader)
        if document is not None:
            _check(document, path, {})
    except yaml.YAMLError as error:
        raise ConfigurationError(f"'{path}' is no YAML: {' '.join(str(error).split())}; mend that line") from error
    except RecursionError as error:
        raise ConfigurationError(f"found values within values without end in '{path}'; write them out") from error
    return text


def _check(node: yaml.Node, path: Path, sizes: dict[int, int]) -> int:
    """Return for how many values a node stands, all aliases written out."""
    if id(node) in sizes:
        return sizes[id(node)]
    size = 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise ConfigurationError(
                        f"found key '{key.value}' twice in '{path}' (again in line {line}), expected it once; "
                        "leave one out"
                    )
                seen.add(key.value)
            size += _check(key, path, sizes) + _check(value, path, sizes)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(entry, path, sizes) for entry in node.value)
    if size > _MOST_VALUES:
        raise ConfigurationError(
            f"found more than {_MOST_VALUES} values in '{path}' with all aliases written out, expected an "
            "experiment's few; leave out the aliases"
        )
    sizes[id(node)] = size
    return size
