"""The ``coin`` command: dispatches to a command, and reports a user's mistake in one line.

A command's module is imported on use, so that commands without PyTorch start quickly.
"""

import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coin.commands import COMMANDS, FUNCTIONS, ON_TRAINER
from coin.commands.early import A_CLASS, check_early, unknown
from coin.commands.safe import SAFE, VARIABLE, enforce
from coin.commands.shipped import with_shipped
from coin.commands.signatures import known_classes
from coin.core.choices import did_you_mean
from coin.errors import CoinError, CoinWarning, ConfigurationError, shortage_behind


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: The command line without the program's name; ``sys.argv`` by default.

    Returns:
        The exit status: 0; 2 for a user's mistake and 130 for an interruption, in one line on standard error.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    name = next((each for each in arguments if not each.startswith("-")), "")
    try:
        with _warnings_in_one_line():
            _run(arguments, name)
    except (KeyboardInterrupt, SystemExit) as stop:
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        resumed = "; the same command goes on where it was" if name in ("run", "sweep") else ""
        print(f"coin: interrupted{resumed}", file=sys.stderr)
        return 130
    except Exception as error:
        mistake = _mistake_behind(error) or shortage_behind(error)
        if mistake is None:
            raise
        line = str(mistake)
        if isinstance(mistake, ConfigurationError) and ";" not in line:
            line += f"; see coin {name if name in COMMANDS else 'COMMAND'} --help"
        print(f"coin: error: {line}", file=sys.stderr)
        return 2
    return 0


def _run(arguments: list[str], name: str) -> None:
    if (asked := os.environ.get(VARIABLE, "0")) not in ("", "0", "1"):
        raise ConfigurationError(f"found {VARIABLE}={asked}, expected 0 or 1; set it to 1 to be safe")
    safe = SAFE in arguments or asked == "1"
    arguments = [each for each in arguments if each != SAFE]
    if not arguments:
        raise ConfigurationError(f"found no command, expected one of {', '.join(COMMANDS)}")
    if arguments[0] in ("-h", "--help"):
        print(_help())
        return
    if arguments[0] == "--version":
        print(f"coin {version('coded-coin')}")
        return
    if arguments[0] not in COMMANDS:
        meant = did_you_mean(arguments[0], COMMANDS)
        raise ConfigurationError(f"found command '{arguments[0]}'{meant}, expected one of {', '.join(COMMANDS)}")
    if safe:
        enforce()
    elif (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)  # for classes of the user's own, as `python -m` would have it
    options = with_shipped(name, arguments[1:])
    if name in ("run", "sweep"):
        options = [re.sub("^--executor(?==|$)", "--launch.executor", each) for each in options]
    check_early(name, options)
    if name in ON_TRAINER or name in FUNCTIONS:
        import_module(f"coin.commands.{'trainer' if name in ON_TRAINER else 'functions'}").main([name, *options])
    else:
        import_module(f"coin.commands.{name}").main(options)


def _help() -> str:
    commands = "\n".join(f"  {name:10} {summary}" for name, summary in COMMANDS.items())
    return f"""usage: coin COMMAND [options]

Erasure-coded neural networks: one coded model, built in closed form, stands in for a lost expert.

{commands}

coin COMMAND --help lists a command's options; -c FILE.yaml gives them in a file, or -c NAME in one that
comes with coin, such as quickstart; --print_config shows all of them. {SAFE}: import no class that is
not on coin's allow-list (coin.commands.safe)."""


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print our own warnings like our errors, without the line of source code that Python adds."""
    plain = warnings.showwarning

    def formatted(message: Warning | str, *place: Any) -> str:
        return f"coin: warning: {' '.join(str(message).split())}\n"

    def shown(message: Warning | str, category: type[Warning], *place: Any) -> None:
        usual = warnings.formatwarning  # Lightning's, once that is imported
        try:
            if issubclass(category, CoinWarning):
                warnings.formatwarning = formatted  # type: ignore[assignment]
            plain(message, category, *place)
        finally:
            warnings.formatwarning = usual

    warnings.showwarning = shown  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = plain


def _mistake_behind(error: BaseException | None) -> CoinError | None:
    """Return the CoinError behind an error: jsonargparse and Lightning wrap ours in longer ones."""
    outermost = error
    while error is not None and not isinstance(error, CoinError):
        error = error.__cause__ or error.__context__
    if error is None and isinstance(outermost, ArgumentError):
        return ConfigurationError(_told(str(outermost)))
    return error


def _told(message: str) -> str:
    """Shorten a parser's message about an option to one line."""
    text = " ".join(message.split())
    before, union, after = text.partition("Does not validate against any of the Union subtypes")
    if union:  # of all types that an option may be, the reasons that say more than that it is not left out
        reasons = after.partition("Errors: - ")[2].partition(" Given value type")[0].split(" - ")
        told = [reason for reason in reasons if "NoneType" not in reason and "Expected a path" not in reason]
        given = after.partition(" Given value: ")[2]
        found = f"found {given}: " if given.isidentifier() and given not in "".join(told) else ""
        text = f"{before.partition(' - ')[0].strip()} {found}{'; or '.join(dict.fromkeys(told))}"
    if refused := re.search(r"given class_path '([\w.]+)': Option '(\w+)' is not accepted", text):
        path, option = refused.groups()
        if names := _options_of(path):
            return unknown(f"{path.rpartition('.')[2]} option", option, names)
    before, wanted, name = text.partition("Expected a dot import path string: ")
    if wanted:
        name = name.split("; or ")[0]
        text = before + unknown("class", name, known_classes(), A_CLASS)
    return text if len(text) <= 400 else f"{text[:400]} …"


def _options_of(path: str) -> list[str]:
    """Return the names of the options that a class takes; none if it is not found by its path."""
    from jsonargparse import ArgumentParser  # which the command has imported by now

    module, _, name = path.rpartition(".")
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_class_arguments(getattr(import_module(module), name))
    except (ImportError, AttributeError, ValueError):
        return []
    names = dict.fromkeys(each.dest.partition(".")[0] for each in parser._actions)
    return [name for name in names if name != "help"]
