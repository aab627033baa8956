"""The ``coin`` command: dispatches to a command, and reports a user's mistake in one line.

A command's module is imported on use, so that ``coin --help`` starts quickly.
"""

import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from types import FrameType
from typing import Any

from coin.commands import COMMANDS, FUNCTIONS, ON_TRAINER
from coin.core.choices import did_you_mean
from coin.errors import CoinError, CoinWarning, ConfigurationError

_LONGEST = 500
"""Characters of a parser's message."""
_INTERRUPTED, _TERMINATED = 130, 143
"""What shells give for SIGINT and SIGTERM: 128 and the signal's number."""
_received: list[int] = []
"""The exit statuses for the signals that have come: C code may turn what a handler raises into an error of its own."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command, from the command line's words behind ``coin``, by default the process's own.

    Returns the exit status: 0; 2 for a user's mistake, 130 for an interruption and 143 for SIGTERM (a scheduler's, at
    a job's limit of time); each in one line on standard error.
    """
    _received.clear()
    arguments = list(sys.argv[1:] if args is None else args)
    name = arguments[0] if arguments else ""
    usual = warnings.formatwarning
    warnings.formatwarning = partial(_format_warning, usual)
    try:
        _run(name, arguments[1:])
    except BaseException as error:
        status = _interruption(error)
        if status is not None:
            by = " by SIGTERM" if status == _TERMINATED else ""
            resumed = "; the same command goes on where it was" if name == "run" else ""
            print(f"coin: interrupted{by}{resumed}", file=sys.stderr)
            return status
        line = _mistake(error)
        if line is None:
            raise
        see = "" if ";" in line else f"; see coin {name if name in COMMANDS else 'COMMAND'} --help"
        print(f"coin: error: {line}{see}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = usual
    return 0


def take_signals() -> None:
    """Have SIGINT and SIGTERM end the command, and noted; SIGINT stays ignored where it is, in a shell's background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """Note a signal, and end the command by an exception."""
    _received.append(128 + number)
    raise KeyboardInterrupt


def _interruption(stop: BaseException) -> int | None:
    """Return the exit status for what was interrupted; None for what ended itself: by ``--help``, or by an error."""
    if _received:
        return _received[0]
    if isinstance(stop, KeyboardInterrupt):
        return _INTERRUPTED
    if isinstance(stop, SystemExit) and stop.code == signal.SIGTERM:
        return _TERMINATED  # while Ray starts, which has a handler of its own
    return None


def _run(name: str, options: list[str]) -> None:
    if name in ("-h", "--help", "--version"):
        print(f"coin {version('coded-coin')}" if name == "--version" else _help())
        return
    if name not in COMMANDS:
        found = f"command '{name}'{did_you_mean(name, COMMANDS)}" if name else "no command"
        raise ConfigurationError(f"found {found}, expected one of {', '.join(COMMANDS)}")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # for classes of the user's own, as `python -m` would have it
    if name in ON_TRAINER:
        import_module("coin.commands.trainer").main(name, options)
    elif name in FUNCTIONS:
        import_module("coin.commands.parser").run_function(name, options)
    else:
        import_module(f"coin.commands.{name}").main(options)


def _help() -> str:
    commands = "\n".join(f"  {name:10} {summary}" for name, summary in COMMANDS.items())
    return f"""usage: coin COMMAND [options]

Erasure-coded neural networks: one small body and an adapter for each expert keep answering when servers are lost.

{commands}

coin COMMAND --help lists a command's options; -c FILE.yaml gives them in a file, or -c NAME in one that
comes with coin, such as quickstart; --print_config shows all of them. --import=MODULE imports a module of your own
whose networks a command reads from files."""


def _format_warning(
    usual: Callable[..., str], message: Warning | str, category: type[Warning], *place: Any
) -> str:
    """Return our own warnings like our errors, without the line of source code that Python adds."""
    if issubclass(category, CoinWarning):
        return f"coin: warning: {' '.join(str(message).split())}\n"
    return usual(message, category, *place)


def _mistake(error: BaseException) -> str | None:
    """Return the line about an error of ours, or about options that a parser refuses; None for everything else."""
    if not isinstance(error, ArgumentError | CoinError | ValueError):
        return None
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, CoinError):
        # Jsonargparse hands on what a constructor raises as the cause of an error of its own.
        cause = cause.__cause__
    if cause is not None:
        return None if "\n" in str(cause) else str(cause)
    if isinstance(error, ArgumentError):
        return shorten(str(error), _LONGEST, placeholder=" …")
    return None
