"""The ``coin`` command: LightningCLI with the commands of coded networks."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console

import coin.data
import coin.merging
import coin.modules  # noqa: F401
from coin import safe
from coin.callbacks import ExpertExport, FisherEstimator  # noqa: F401
from coin.errors import CoinError, CoinWarning, ConfigurationError, FileError
from coin.experiment import Experiment
from coin.experiment.commands import merge, report
from coin.experiment.launch import Launch
from coin.experiment.serve import serve
from coin.experiment.simulate import simulate
from coin.experiment.sweep import sweep
from coin.parsing import CoinParser
from coin.processes import is_first
from coin.progress import shown
from coin.reporting import (
    as_json,
    print_simulation,
    print_summary,
    read_results,
    run_environment,
    summarise,
    write_report,
)
from coin.reporting.dashboard import dashboard
from coin.reporting.report import REPORT_HTML, report_summary
from coin.reporting.simulation import SIMULATION_CSV
from coin.reporting.sweeps import SWEEP_CSV
from coin.reporting.wandb_logging import logger_mode
from coin.shortages import shortage_behind
from coin.trainer import Trainer, quieten

_PLAIN = ("run", "merge", "sweep", "report", "dashboard", "simulate", "serve")
"""The commands that build their own trainers, or need none."""


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
        for name in _PLAIN:
            sub = self.init_parser(**kwargs.get(name, {}))
            if name == "run":
                _add_run_arguments(sub)
                _add_json_argument(sub)
                summary = "Run a whole experiment, resumably."
            elif name == "merge":
                sub.add_function_arguments(merge)
                summary = "Merge experts into coded models."
            elif name == "sweep":
                _add_sweep_arguments(sub)
                summary = "Run an experiment over a grid or random draws of its options."
            elif name == "dashboard":
                sub.add_argument("project", type=str, help="ENTITY/PROJECT, or PROJECT of your default entity.")
                sub.add_argument("--group", type=str | None, default=None, help="The one experiment to show.")
                sub.add_argument("--name", type=str | None, default=None, help="What to call the workspace.")
                summary = "Make a W&B workspace of a project's experiments, online."
            elif name == "serve":
                _add_with_folder(sub, serve, skip={"build", "say"})
                summary = "Serve an experiment's experts and coded models over HTTP, on Ray Serve."
            elif name == "simulate":
                _add_with_folder(sub, simulate)
                summary = "Simulate the tail latency of coded serving with an experiment's networks."
            else:
                sub.add_argument("folders", nargs="+", type=str, help="Experiments', seeds' or sweeps' folders.")
                sub.add_argument("--output", type=str | None, default=None, help="The HTML file to write.")
                _add_json_argument(sub)
                summary = "Write the report of finished experiments."
            subcommands.add_subcommand(name, sub, help=summary)
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
        for name in ("network", "image_size", "options", "num_classes"):
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
        if self.subcommand in _PLAIN:
            return
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigurationError(f"found seed_everything out of range: {error}; give another") from error

    def instantiate_classes(self) -> None:
        """Build what the command needs: trainer, model and data, or none of them."""
        if self.subcommand in _PLAIN:
            self.config_init = self.parser.instantiate_classes(self.config)
        else:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand not in _PLAIN:
            asked = [logger_mode(logger) for logger in self.trainer.loggers if isinstance(logger, WandbLogger)]
            with run_environment(Path(self.trainer.default_root_dir), next(iter(asked), None)):
                super()._run_subcommand(subcommand)
            return
        options = self.config_init[subcommand].as_dict()
        options.pop("config", None)
        machine = options.pop("json", False)
        if subcommand == "run":
            launch, only = options.pop("launch"), options.pop("only")
            experiment = Experiment(**options)
            if only is not None:
                experiment.make_experts(only)
                return
            summary = experiment.run(self._dump_seed, launch=launch)
            page = experiment.folder / REPORT_HTML
            if not is_first():
                return
            if machine:
                print(as_json({"experiment": experiment.name, "report": page, "summary": summary}))
            else:
                print_summary(summary, _console())
                print(f"report: {page}")
        elif subcommand == "merge":
            for path in merge(**options):
                print(path)
        elif subcommand == "sweep":
            outcome = sweep(build=self._experiment, **options)
            if outcome.table is not None:
                _console().print(outcome.table)
                print(f"table: {outcome.folder / SWEEP_CSV}")
                print(f"report: {write_report([outcome.folder])}")
            outcome.check()
        elif subcommand == "dashboard":
            print(dashboard(**options))
        elif subcommand == "serve":
            serve(build=self._experiment, **options)
        elif subcommand == "simulate":
            print_simulation(simulate(**options), _console())
            print(f"table: {Path(options['output'] or options['folder']) / SIMULATION_CSV}")
        else:
            page = report(options["folders"], options["output"])
            if machine:
                folders = [Path(folder) for folder in options["folders"]]
                print(as_json({"report": page, "summary": report_summary(folders)}))
            else:
                print(page)

    def _experiment(self, arguments: Sequence[str]) -> Experiment:
        """Return the experiment that ``coin run`` makes of these arguments."""
        parser = self._subcommand_parsers["run"]
        options = parser.instantiate_classes(parser.parse_args(list(arguments))).as_dict()
        for name in ("config", "json", "launch", "only"):
            options.pop(name, None)
        return Experiment(**options)

    def after_evaluate(self) -> None:
        """Print the table of what was just measured."""
        options = self.config["evaluate"]
        if self.trainer.is_global_zero:
            folder = Path(options["output"] or self.trainer.default_root_dir)
            print_summary(summarise(read_results(folder)), _console())

    def _dump_seed(self, seed: int) -> str:
        config = self.config["run"].clone()
        config["seeds"] = [seed]
        for name in ("json", "launch", "only"):
            config.pop(name)
        return str(self._subcommand_parsers["run"].dump(config, skip_none=False))


def _add_run_arguments(parser: LightningArgumentParser) -> None:
    parser.add_class_arguments(Experiment)
    parser.add_class_arguments(Launch, "launch")
    parser.add_argument(
        "--only", type=str | None, default=None, help="Make this task's expert for every seed, and nothing else."
    )


def _add_json_argument(parser: LightningArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="Print the summary as one JSON document, and nothing else, on stdout."
    )


def _add_sweep_arguments(parser: LightningArgumentParser) -> None:
    parser.add_argument("file", type=str, help="The sweep's YAML, as for `wandb sweep`; see configs/sweep.")
    parser.add_argument("--output", type=str, default="runs", help="Where the sweep's folder goes.")
    parser.add_argument("--jobs", type=int | None, default=None, help="Points at a time; one per two cores by default.")
    parser.add_argument(
        "--count", type=int | None, default=None, help="At most so many points; a random sweep needs it."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of a random sweep's draws.")


def _add_with_folder(
    parser: LightningArgumentParser, command: Callable[..., Any], skip: set[str | int] | None = None
) -> None:
    """Take a command's options, its first one, an experiment's folder, without a name."""
    parser.add_argument("folder", type=str, help="An experiment's or a seed's folder.")
    parser.add_function_arguments(command, skip={"folder", *(skip or ())})


def _console() -> Console:
    """Return a console for results: as wide as the terminal, or 100 columns where nobody watches."""
    return Console(width=None if sys.stdout.isatty() else 100)


def checkpoint_options(path: Path) -> dict[str, Any]:
    """Return the hyper-parameters in a Lightning checkpoint.

    Raises:
        FileError: The file is missing or damaged, or is no such checkpoint.
    """
    if not path.is_file():
        raise FileError(f"found no checkpoint '{path}', expected a file; check ckpt_path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        _ = checkpoint["state_dict"], checkpoint["pytorch-lightning_version"]
        return dict(checkpoint["hyper_parameters"])
    except Exception as error:  # pickle's and zip's errors share no base class
        raise FileError(
            f"cannot read '{path}' as a Lightning checkpoint of an expert; give one that coin fit wrote"
        ) from error


def main(args: list[str] | None = None) -> int:
    """Run one command.

    Args:
        args: The command line without the program's name; ``sys.argv`` by default.

    Returns:
        The exit status: 0, or 2 for a user's mistake, which is told in one line on standard error.
    """
    quieten()
    try:
        is_safe, args = safe.wanted(sys.argv[1:] if args is None else args, os.environ)
        if is_safe:
            safe.enforce()
        with _warnings_in_one_line(), shown(Console(stderr=True)):
            CoinCLI(
                LightningModule,
                LightningDataModule,
                trainer_class=Trainer,
                parser_class=CoinParser,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=SaveFitConfig,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={"epilog": _EPILOG},
                seed_everything_default=0,
                args=args,
            )
    except Exception as error:
        mistake = _mistake_behind(error) or shortage_behind(error)
        if mistake is None:
            raise
        print(f"coin: error: {' '.join(str(mistake).split())}", file=sys.stderr)
        return 2
    return 0


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
