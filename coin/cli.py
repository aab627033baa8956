"""The ``coin`` command: LightningCLI with the commands of coded networks."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

import coin.data
import coin.merging
import coin.modules  # noqa: F401
from coin import safe
from coin.callbacks import ExpertExport, FisherEstimator  # noqa: F401
from coin.commands import COMMANDS, Call
from coin.commands.command import console
from coin.errors import CoinError, CoinWarning, ConfigurationError
from coin.files.checkpoints import checkpoint_options
from coin.modules.shared import quieten
from coin.parsing import CoinParser
from coin.reporting import (
    print_summary,
    read_results,
    run_environment,
    summarise,
)
from coin.reporting.wandb_logging import logger_mode
from coin.shortages import shortage_behind
from coin.trainer import Trainer

_DESCRIPTION = "Erasure-coded neural networks: one coded model, built in closed form, stands in for a lost expert."
_EPILOG = f"{safe.SAFE}, before or after the command: import no class that is not on coin's allow-list (coin.safe)."


class SaveFitConfig(SaveConfigCallback):
    """Leaves ``config.yaml`` with what was trained; the other commands write what they did into their results."""

    def setup(self, trainer: pl.Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file before a training run."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class CoinCLI(LightningCLI):
    """The commands ``fit validate test predict fisher evaluate`` on a Trainer, the rest without."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the Trainer's commands and which of their arguments LightningCLI supplies."""
        own = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "fisher": own, "evaluate": own | {"configuration"}}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        subcommands = parser._subcommands_action
        assert subcommands is not None
        for name, command in COMMANDS.items():
            sub = self.init_parser(**{"description": command.summary, **kwargs.get(name, {})})
            command.add_arguments(sub)
            subcommands.add_subcommand(name, sub, help=command.summary)
            self._subcommand_parsers[name] = sub

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make the expert the default model: ``coin fit --data MNIST5k`` is a whole command."""
        parser.set_defaults({"model": {"class_path": "coin.modules.Expert"}})

    def _parse_ckpt_path(self) -> None:
        """Take the architecture from a checkpoint that is to be tested, and leave a configured training run alone.

        Lightning would replace all of the configured model's options by the checkpoint's, and do so in ``fit`` too.
        """
        subcommand = self.config.subcommand
        if subcommand not in ("validate", "test", "predict", "fisher"):
            return
        options = self.config[subcommand]
        path = options.get("ckpt_path")
        if path is None or (subcommand == "fisher" and not str(path).endswith(".ckpt")):
            return
        if not str(path).endswith(".ckpt"):
            raise ConfigurationError(f"found ckpt_path '{path}', expected a .ckpt of Lightning's for coin {subcommand}")
        found = checkpoint_options(Path(path))
        init_args = options["model"]["init_args"]
        for name in ("network", "image_size", "options", "num_classes", "lora"):
            if name in found and name in init_args:
                init_args[name] = found[name]
        for name in ("weights", "initial"):  # about to be overwritten: nothing to download or to look for
            if name in init_args:
                init_args[name] = None

    def before_instantiate_classes(self) -> None:
        """Refuse, with ``--safe``, what no allow-list of classes can hold back."""
        if os.environ.get(safe.VARIABLE) == "1":
            safe.check_options(self.config[self.subcommand])

    def _set_seed(self) -> None:
        if self.subcommand in COMMANDS:
            return
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigurationError(f"found seed_everything out of range: {error}; give another") from error

    def instantiate_classes(self) -> None:
        """Build what the command needs: trainer, model and data, or none of them."""
        if self.subcommand in COMMANDS:
            self.config_init = self.parser.instantiate_classes(self.config)
        else:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand not in COMMANDS:
            asked = [logger_mode(logger) for logger in self.trainer.loggers if isinstance(logger, WandbLogger)]
            with run_environment(Path(self.trainer.default_root_dir), next(iter(asked), None)):
                super()._run_subcommand(subcommand)
            return
        options = self.config_init[subcommand].as_dict()
        options.pop("config", None)
        COMMANDS[subcommand].execute(Call(options, self.config[subcommand], self._subcommand_parsers["run"]))

    def after_evaluate(self) -> None:
        """Print the table of what was just measured."""
        options = self.config["evaluate"]
        if self.trainer.is_global_zero:
            folder = Path(options["output"] or self.trainer.default_root_dir)
            print_summary(summarise(read_results(folder)), console())


def main(args: list[str] | None = None) -> int:
    """Run one command.

    Args:
        args: The command line without the program's name; ``sys.argv`` by default.

    Returns:
        The exit status: 0, or 2 for a user's mistake, which is told in one line on standard error.
    """
    quieten()
    warnings.filterwarnings(
        "ignore", message=r"LightningCLI's args parameter is intended.*"
    )  # without --safe among them
    try:
        is_safe, args = safe.wanted(sys.argv[1:] if args is None else args, os.environ)
        if is_safe:
            safe.enforce()
        elif (folder := str(Path.cwd())) not in sys.path:
            sys.path.append(folder)  # for classes of the user's own, as `python -m` would have it
        with _warnings_in_one_line():
            CoinCLI(
                LightningModule,
                LightningDataModule,
                trainer_class=Trainer,
                parser_class=CoinParser,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=SaveFitConfig,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={"prog": "coin", "description": _DESCRIPTION, "epilog": _EPILOG},
                seed_everything_default=0,
                args=args,
            )
    except Exception as error:
        mistake = _mistake_behind(error) or shortage_behind(error)
        if mistake is None:
            raise
        print(f"coin: error: {_with_advice(mistake, args or [])}", file=sys.stderr)
        return 2
    return 0


def _with_advice(mistake: CoinError, args: Sequence[str]) -> str:
    """Return a mistake in one line; one that says no more than what is allowed gets the way to the help."""
    line = str(mistake)
    if not isinstance(mistake, ConfigurationError) or ";" in line:
        return line
    commands = [argument for argument in args if argument in {*COMMANDS, *CoinCLI.subcommands()}]
    return f"{line}; see coin {' '.join(commands[:1] or ['COMMAND'])} --help"


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print our own warnings like our errors; Python's form names a line of source that says nothing to a user."""
    plain = warnings.formatwarning

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if issubclass(category, CoinWarning):
            return f"coin: warning: {' '.join(str(message).split())}\n"
        return plain(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = plain


def _mistake_behind(error: BaseException | None) -> CoinError | None:
    """Return the mistake that an error is about: jsonargparse and Lightning wrap ours in pages of their own."""
    while error is not None and not isinstance(error, CoinError):
        error = error.__cause__ or error.__context__
    return error
