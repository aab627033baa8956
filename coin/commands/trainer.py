"""``coin fit | validate | test | predict | fisher | evaluate``: the commands that need a Trainer, by LightningCLI."""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import coin.merging  # noqa: F401
from coin.callbacks import ExpertExport, FisherEstimator  # noqa: F401
from coin.commands.arguments import apply_common_options
from coin.core.lightning import silence_lightning
from coin.modules import Expert
from coin.networks.registry import check_imported
from coin.networks.weights import read_checkpoint
from coin.reporting.results import RESULTS_CSV, read_results
from coin.reporting.tables import print_standins
from coin.tracking.settings import run_environment
from coin.trainer import Trainer  # imports all tasks and modules, which are found by short names

_ARCHITECTURE = (
    "network",
    "image_size",
    "options",
    "mean",
    "std",
    "num_classes",
    "weights",
    "initial",
)
"""Options of an expert that a checkpoint decides."""


class TrainerCLI(LightningCLI):
    """LightningCLI with ``fisher`` and ``evaluate``, and every run's W&B files in its own folder."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the Trainer's commands, and the arguments that LightningCLI supplies to them."""
        own = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "fisher": own, "evaluate": own | {"configuration"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make the expert the default model: ``coin fit --data MNIST5k`` is a whole command."""
        parser.set_defaults({"model": {"class_path": "coin.modules.Expert"}})
        parser.add_argument("--output", type=str | None, help="Short for trainer.default_root_dir.")

    def _parse_ckpt_path(self) -> None:
        """Take only the architecture from the checkpoint, and none for ``fit``; Lightning would take all options."""
        subcommand = self.config.subcommand
        options = self.config[subcommand]
        path = options.get("ckpt_path")
        if path is None or subcommand in ("fit", "evaluate"):
            return
        if subcommand == "fisher" and not path.endswith(".ckpt"):
            return  # an expert's file, which says what it is
        found = read_checkpoint(Path(path), ["state_dict", "hyper_parameters"])["hyper_parameters"]
        init_args = options["model"]["init_args"]
        named = found.get("network")
        if named is not None and named != init_args.get("network"):
            check_imported(named, Path(path))
        # Weights are about to be overwritten: nothing to download or to look for.
        own = {**found, "weights": None, "initial": None}
        for name in _ARCHITECTURE:
            if name in own and name in init_args:
                init_args[name] = own[name]

    def before_instantiate_classes(self) -> None:
        """Set missing seeds and the one folder to write to; ``config.yaml`` is written beside a trained model alone."""
        options = self.config[self.subcommand]
        trainer = options["trainer"]
        folder = options["output"] or trainer["default_root_dir"]
        if self.subcommand != "fit":
            self.save_config_callback = None
        if self.subcommand == "fisher" and options["ckpt_path"] and folder is None:
            folder = str(Path(options["ckpt_path"]).parent)
        trainer["default_root_dir"] = folder
        loggers = trainer["logger"] if isinstance(trainer["logger"], list) else [trainer["logger"]]
        for logger in loggers:
            if folder is not None and "save_dir" in getattr(logger, "init_args", ()):
                logger.init_args.save_dir = folder
        for part in ("model", "data"):
            _hand_on_seed(options.get(part), int(options["seed_everything"]))

    def after_instantiate_classes(self) -> None:
        """Have a trained expert written to the folder that was given, and keep W&B's files there."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        has_folder = self.config[self.subcommand]["trainer"]["default_root_dir"] is not None
        has_export = any(isinstance(callback, ExpertExport) for callback in callbacks)
        if isinstance(self.model, Expert) and has_folder and not has_export:
            callbacks.insert(0, ExpertExport())
        _ENVIRONMENT.enter_context(run_environment(Path(self.trainer.default_root_dir)))

    def after_fit(self) -> None:
        """Print the file of the expert, or the folder."""
        file: Path | str = self.trainer.default_root_dir
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ExpertExport):
                file = callback.file(self.trainer)
        self._say("trained", file)

    def after_fisher(self) -> None:
        """Print the statistic's file."""
        file = f"expert.{self.config.fisher.statistic}.safetensors"
        self._say("computed", Path(self.trainer.default_root_dir) / file)

    def after_evaluate(self) -> None:
        """Print the table of the results, and their file."""
        folder = Path(self.trainer.default_root_dir)
        if self.trainer.is_global_zero:
            print_standins(read_results(folder))
        self._say("measured", folder / RESULTS_CSV)

    def _say(self, reached: str, file: Path | str) -> None:
        if self.trainer.is_global_zero:
            print(f"{reached}; wrote {file}")


_ENVIRONMENT = ExitStack()


def _hand_on_seed(options: Any, seed: int) -> None:
    """Set the seed of the model and of every task that has none; `Tasks` leaves each task its own."""
    if not isinstance(options, dict | Namespace):
        return
    for entry in options.values():
        _hand_on_seed(entry, seed)
    init_args = (
        {} if str(options.get("class_path")).endswith(".Tasks") else options.get("init_args") or {}
    )
    if "seed" in init_args and init_args["seed"] is None:
        init_args["seed"] = seed


def main(command: str, arguments: Sequence[str]) -> None:
    """Run a Trainer's command."""
    silence_lightning()
    warnings.filterwarnings("ignore", message=r"LightningCLI's args parameter is intended.*")
    with _ENVIRONMENT:
        TrainerCLI(
            LightningModule,
            LightningDataModule,
            trainer_class=Trainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # an expert's optimiser is an option of its own
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "coin", "exit_on_error": False, "allow_abbrev": False},
            seed_everything_default=0,
            args=[command, *apply_common_options(arguments)],
        )
