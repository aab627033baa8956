"""The ``coin`` command: dispatches to a command, and reports a user's mistake in one line.

A command's module is imported on use, so that ``coin --help`` starts quickly.
"""

import os
import re
import signal
import sys
import threading
import warnings
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from coin.commands import COMMANDS, FUNCTIONS, ON_TRAINER
from coin.core.choices import did_you_mean
from coin.errors import CoinError, CoinWarning, ConfigurationError

_INTERRUPTED, _TERMINATED = 130, 143
"""What shells give for SIGINT and SIGTERM: 128 and the signal's number."""
_received: list[int] = []
"""The exit statuses for the signals that have come: C code may turn what a handler raises into an error of its own."""


_FORMS = {
    "adapters": "adapters: {rank: 16}",
    "compress": "compress: {bits: 4}",
    "replicas": "replicas: [{bits: 3, base_bits: 8}]",
    "code": "code: [[0.5, 0.5]], a row of weights for each coded model, or code: 1, how many there are",
    "epochs": "a whole number",
    "network": "network: {name: resnet18}",
    "tasks": "tasks: {NAME: {class_path: Glyphs, init_args: {classes: A-J}}}",
    "methods": "methods: [{class_path: Refit, init_args: {adapters: {rank: 16}}}]",
}
"""The right form of options that are often given in another one."""


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
    sys.unraisablehook = partial(_send_again, sys.unraisablehook)


def _send_again(usual: Callable[[Any], object], unraisable: Any) -> None:
    """Send a signal again that came where Python ignores what is raised: in a ``__del__``."""
    if _received and isinstance(unraisable.exc_value, KeyboardInterrupt):
        threading.Timer(0.05, os.kill, (os.getpid(), _received[-1] - 128)).start()
    else:
        usual(unraisable)


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
    # By SIGTERM while steps run elsewhere, and while Ray starts, which has a handler of its own.
    if isinstance(stop, SystemExit) and stop.code in (_TERMINATED, int(signal.SIGTERM)):
        return _TERMINATED
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
    options = _import_named(options)
    short, full = (
        ("output", "trainer.default_root_dir")
        if name in ON_TRAINER
        else ("cluster", "launch.cluster")
    )
    options = [re.sub(f"^--{short}(?==|$)", f"--{full}", option) for option in options]
    if name in ON_TRAINER:
        import_module("coin.commands.trainer").main([name, *options])
    elif name in FUNCTIONS:
        import_module("coin.commands.parser").run_function(name, options)
    else:
        import_module(f"coin.commands.{name}").main(options)


def _import_named(options: list[str]) -> list[str]:
    """Import the modules that ``--import`` names, which no file may choose; return the other options."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--import", dest="modules", action="append", default=[])
    found, others = parser.parse_known_args(options)
    for module in found.modules:
        try:
            import_module(module)
        except ImportError as error:
            raise ConfigurationError(
                f"found --import={module}, expected a module ({error}); run where it is, or install it"
            ) from error
    return others


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
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, CoinError):
        # Jsonargparse hands on what a constructor raises as the cause of an error of its own.
        cause = cause.__cause__
    if not isinstance(error, ArgumentError | CoinError) and not (
        isinstance(error, ValueError) and cause
    ):
        return None
    if cause is not None:
        return None if "\n" in str(cause) else str(cause)
    text = " ".join(str(error).split())
    spare = (
        r"- Not a valid subclass of .*?(?=- Expected a <)|Does not validate against .*? Errors: |"
        r" Given value type: (.*? Given value: Namespace.*|\S+ \S+)"
    )
    line = re.sub(spare, "", text)[:400]
    name = re.search(r"import path string: (\w+)$", line)
    if name is not None:
        coin = import_module("coin")
        line += did_you_mean(name[1], [*dir(coin), *dir(coin.data)])
    options = re.findall(r'Parser key "(?:[\w.]+\.)?(\w+)"', line)
    form = _FORMS.get(options[-1]) if options else None
    return f"{line}, expected {form}" if form else line
