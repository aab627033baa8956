"""What a method that goes on from another one's coded model starts from."""

from collections.abc import Iterator, Mapping
from typing import Any

from coin.errors import ConfigurationError
from coin.merging.method import Method


def starting_method(start: str | Mapping[str, Any]) -> Method:
    """Return the closed form that the option `start` stands for.

    Args:
        start: The name that results give it, for its default options; or ``{class_path: …, init_args: {…}}``, as in
            an experiment's list of methods.

    Raises:
        ConfigurationError: It is none, it trains or needs the shared initialisation, or an option is unknown or out of
            its range.
    """
    allowed = [kind for kind in _kinds() if not (kind.is_trained or kind.reads_initial)]
    kinds = {kind.name: kind for kind in allowed if "name" in vars(kind)}  # not one that inherits another's
    expected = f"expected one of {', '.join(sorted(kinds))}, or class_path and init_args of one"
    if isinstance(start, str):
        kind, options = kinds.get(start), {}
    elif set(start) <= {"class_path", "init_args"}:
        path = str(start.get("class_path")).rpartition(".")[2]
        kind = next((each for each in allowed if each.__name__ == path), None)
        options = dict(start.get("init_args") or {})
    else:
        kind, options = None, {}
    if kind is None:
        raise ConfigurationError(f"found start={start!r}, {expected}")
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigurationError(f"found start={start!r}, expected options of {kind.__name__} ({error})") from error


def _kinds(kind: Any = Method) -> Iterator[type[Method]]:
    """Yield all methods that can be made."""
    for each in kind.__subclasses__():
        if not each.__abstractmethods__:
            yield each
        yield from _kinds(each)
