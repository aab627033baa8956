"""``coin fit | validate | test | predict | fisher | evaluate``: the commands that need a Trainer, by LightningCLI."""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from pydoc import locate
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import coin.merging  # noqa: F401
from coin.callbacks import ExpertExport, FisherEstimator, Weights  # noqa: F401
from coin.commands import ON_TRAINER, closing
from coin.commands.parser import checked_arguments
from coin.core.lightning import silence_lightning
from coin.errors import ConfigurationError
from coin.modules import Expert
from coin.networks.weights import TO_GO_ON, read_checkpoint
from coin.tracking.settings import run_environment
from coin.trainer import Trainer  # imports all tasks and modules, which are found by short names


class TrainerCLI(LightningCLI):
    """LightningCLI with ``fisher`` and ``evaluate``, and every run's W&B files in its own folder."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the Trainer's commands, and the arguments that LightningCLI supplies to them."""
        own = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "fisher": own, "evaluate": own | {"configuration"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--output``, and the expert as the default model: ``coin fit --data MNIST5k`` is a whole command."""
        folder = "The folder for all files; by default the working directory, or that of fisher's checkpoint."
        parser.add_argument("--output", type=str | None, help=folder)
        parser.set_defaults({"model": {"class_path": "coin.modules.Expert"}})

    def _parse_ckpt_path(self) -> None:
        """Take only the architecture from the checkpoint, and none for ``fit``; Lightning would take all options."""
        subcommand, options = self.config.subcommand, self.config[self.config.subcommand]
        path = options.get("ckpt_path")
        is_file = path is not None and not str(path).endswith(".ckpt")
        if path is None or subcommand in ("fit", "evaluate") or (is_file and subcommand == "fisher"):
            return
        if is_file:
            raise ConfigurationError(f"found ckpt_path '{path}', expected a .ckpt of Lightning's for coin {subcommand}")
        found = read_checkpoint(Path(path), ["state_dict", "hyper_parameters"])["hyper_parameters"]
        init_args = options["model"]["init_args"]
        for name in ("network", "image_size", "options", "num_classes"):
            if name in found and name in init_args:
                init_args[name] = found[name]
        for name in ("weights", "initial"):  # about to be overwritten: nothing to download or to look for
            if name in init_args:
                init_args[name] = None

    def before_instantiate_classes(self) -> None:
        """Set missing seeds and the one folder to write to; ``config.yaml`` is written beside a trained model alone."""
        options = self.config[self.subcommand]
        self.save_config_callback = self.save_config_callback if self.subcommand == "fit" else None
        checkpoint = options.get("ckpt_path") if self.subcommand == "fisher" else None
        beside = None if checkpoint is None else str(Path(checkpoint).parent)
        folder = self._folder_given(options) or beside
        options["trainer"]["default_root_dir"] = folder
        if self.subcommand == "fit" and folder is not None:
            _add_export(options)
        loggers = options["trainer"]["logger"]
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if folder is not None and "save_dir" in getattr(logger, "init_args", ()):
                logger.init_args.save_dir = folder
        for part in ("model", "data"):
            _hand_on_seed(options.get(part), int(options["seed_everything"]))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, and keep the command line's words."""
        self._words = list(args)
        super().parse_arguments(parser, args)

    def _folder_given(self, options: Namespace) -> str | None:
        """Return the folder given as ``--output`` or as the Trainer's, which decides, as users of Lightning expect.

        Only ``--output`` on the command line goes before a Trainer's folder that stands in a file.
        """
        output, root = options["output"], options["trainer"]["default_root_dir"]
        given = {word.partition("=")[0] for word in self._words}
        output_decides = "--output" in given and "--trainer.default_root_dir" not in given
        found: str | None = output or root if output_decides else root or output
        return found

    def after_instantiate_classes(self) -> None:
        """Keep W&B's files in the run's folder, until the command ends."""
        _ENVIRONMENT.enter_context(run_environment(Path(self.trainer.default_root_dir)))

    def before_fit(self) -> None:
        """Check the checkpoint to resume from, unless Lightning finds it itself."""
        path, trusted = (self.config["fit"][name] for name in ("ckpt_path", "weights_only"))
        if path not in (None, "best", "last", "hpc", "registry") and trusted is not False:
            read_checkpoint(Path(path), TO_GO_ON)

    def say_what_was_reached(self) -> None:
        """Print what a command has reached, its file, and the next command."""
        if self.trainer.is_global_zero:
            print(getattr(closing, f"after_{self.subcommand}")(self.trainer, self.config[self.subcommand]))

    after_fit = after_fisher = after_evaluate = say_what_was_reached


_ENVIRONMENT = ExitStack()


def _add_export(options: Namespace) -> None:
    """Add the callback that writes ``expert.safetensors`` where an expert is trained and the configuration has none."""
    model = locate(str(options["model"]["class_path"]))
    if not (isinstance(model, type) and issubclass(model, Expert)):
        return
    found = options["trainer"]["callbacks"] or []
    callbacks = list(found) if isinstance(found, list) else [found]
    name = f"{ExpertExport.__module__}.{ExpertExport.__name__}"
    if not any(str(each["class_path"]).endswith(".ExpertExport") for each in callbacks):
        init_args = {"path": None, "weights": Weights.last, "task": None}
        own = Namespace({"class_path": name, "init_args": Namespace(init_args)})  # type: ignore[no-untyped-call]
        options["trainer"]["callbacks"] = [*callbacks, own]


def _hand_on_seed(options: Any, seed: int) -> None:
    """Set the seed of the model and of every task that has none; `Tasks` leaves each task its own."""
    if not isinstance(options, dict | Namespace):
        return
    for entry in options.values():
        _hand_on_seed(entry, seed)
    init_args = {} if str(options.get("class_path")).endswith(".Tasks") else options.get("init_args") or {}
    if "seed" in init_args and init_args["seed"] is None:
        init_args["seed"] = seed


def main(arguments: Sequence[str]) -> None:
    """Run a Trainer's command; ``arguments`` begin with its name."""
    silence_lightning()
    warnings.filterwarnings("ignore", message=r"LightningCLI's args parameter is intended.*")
    quiet: dict[str, object] = {"exit_on_error": False, "allow_abbrev": False}
    try:
        with _ENVIRONMENT:
            TrainerCLI(
                LightningModule,
                LightningDataModule,
                trainer_class=Trainer,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,  # an expert's optimiser is an option of its own
                save_config_kwargs={"overwrite": True},
                parser_kwargs={"prog": "coin", **quiet, **{name: dict(quiet) for name in ON_TRAINER}},
                seed_everything_default=0,
                args=[arguments[0], *checked_arguments(arguments[0], arguments[1:])],
            )
    except ValueError as error:
        if "is not in bounds" not in str(error):  # what Lightning says of a seed
            raise
        raise ConfigurationError(f"found seed_everything out of range: {error}; give another") from error
