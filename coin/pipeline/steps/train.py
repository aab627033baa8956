"""The steps to the experts: the shared initialisation, and the training of a network on one task."""

import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from zipfile import is_zipfile

from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from coin.callbacks import ExpertExport, Weights
from coin.core.choices import check_integer, parse_enum
from coin.core.processes import on_rank_zero, rank_zero_info
from coin.data import Augmentation
from coin.data.tasks import task_with
from coin.files.atomic import hashes, sha256_of
from coin.modules import Expert
from coin.modules.recipe import Recipe
from coin.networks import NetworkConfig, save_network
from coin.networks.files import initial_network
from coin.pipeline.step import Step
from coin.tracking.runs import RunLog
from coin.trainer import make_trainer


@dataclass(frozen=True)
class TrainingConfig(Recipe):
    """How a network is trained; tuned values are in the YAML files.

    The options of `coin.modules.recipe.Recipe` are those of ``coin fit`` as well.

    Args:
        epochs: Passes over the training split.
        batch_size: Samples per step and process.
        augmentation: The augmentation of training images: ``none``, ``crop``, ``crop_flip`` or ``shift``.
    """

    epochs: int = 3
    batch_size: int = 64
    augmentation: Augmentation = Augmentation.none

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(
            self, "augmentation", parse_enum(Augmentation, "augmentation", self.augmentation)
        )
        check_integer("epochs", self.epochs, 1)
        check_integer("batch_size", self.batch_size, 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class WriteInitial(Step):
    """Writes the shared initialisation for a number of classes.

    It starts from the base, from a user's `checkpoint` or from the network's own weights. Experts with equal class
    counts share the head; all share the other layers, those of the initialisation with the most classes, `wider`.
    """

    file: ClassVar[str] = "initial.safetensors"
    doing: ClassVar[str] = "writing"
    remote: ClassVar[bool] = False  # it may have to download

    network: NetworkConfig
    base: "TrainNetwork | None" = None
    wider: "WriteInitial | None" = None

    def run(self) -> None:
        """Write the file."""
        classes = self.config["classes"]
        checkpoint = self.config["checkpoint"] if self.base is None else self.base.output
        wider = None if self.wider is None else self.wider.output
        initial = initial_network(self.network, classes, checkpoint, wider=wider)
        read = [path for path in (checkpoint, wider) if path is not None]
        made = {"made_by": "coin run", "base": str(checkpoint), "sha256": hashes(read)}
        save_network(self.output, initial, self.network, classes, made)


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainNetwork(Step):
    """Trains a network on one task, an expert from the shared initialisation or, without one, the base.

    An interrupted training goes on from its last complete epoch. The seed is that of the samples' order and of dropout.
    """

    file: ClassVar[str] = "expert.safetensors"  # checkpoints and logs are in the same folder
    doing: ClassVar[str] = "training"
    collective: ClassVar[bool] = True

    network: NetworkConfig
    recipe: TrainingConfig
    trainer: dict[str, Any]
    initial: WriteInitial | None = None
    log: RunLog

    def run(self) -> None:
        """Train, and write the network; every process takes part."""
        recipe = self.recipe
        seed = self.config["seed"]
        checkpoints = self.folder / "checkpoints"
        ((name, task),) = self.tasks.items()
        on_rank_zero(task.prepare_data)
        weights = getattr(recipe, "weights", Weights.last)
        last = on_rank_zero(partial(_last_checkpoint, checkpoints))
        data = task_with(
            task, seed=seed, batch_size=recipe.batch_size, augmentation=recipe.augmentation
        )
        module = Expert(
            network=self.network.name,
            image_size=self.network.image_size,
            weights=self.network.weights if self.initial is None else None,
            options=self.network.options,
            mean=self.network.mean,
            std=self.network.std,
            num_classes=data.num_classes,
            initial=None if self.initial is None else str(self.initial.output),
            seed=seed,
            **{option.name: getattr(recipe, option.name) for option in fields(Recipe)},
        )
        export = ExpertExport(str(self.output), weights, name)
        callbacks: list[Callback] = [export]
        if weights == Weights.best:
            callbacks.append(ModelCheckpoint(checkpoints, monitor="val/accuracy", mode="max"))
        # Lightning's save_last would write only where another checkpoint is written: where none is the best, nowhere.
        callbacks.append(ModelCheckpoint(checkpoints, "last", enable_version_counter=False))
        with self.log.open(self.folder) as loggers:
            trainer = make_trainer(
                checkpoints,
                {"enable_progress_bar": sys.stdout.isatty(), **self.trainer},
                logger=loggers,
                log_every_n_steps=10,
                max_epochs=recipe.epochs,
                callbacks=callbacks,
                enable_checkpointing=True,
            )
            seed_everything(seed, workers=True, verbose=False)
            trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
            if not on_rank_zero(self.output.is_file):
                # The checkpoint was of a finished training: Lightning restores it and trains nothing.
                export.on_train_end(trainer, module)
        if self.initial is None:
            task.release()  # the base's task is not read again

    def finish(self, seconds: float) -> None:
        """Mark it as finished, and remove the checkpoints that an interrupted training would have gone on from."""
        super().finish(seconds)
        for path in (self.folder / "checkpoints").glob("*.ckpt"):
            path.unlink()


def _last_checkpoint(checkpoints: Path) -> str | None:
    """Return the checkpoint that an interrupted training goes on from, if any; a torn one is set aside.

    Lightning copies it across file systems, and may be killed at that: then it ends too early.
    """
    last = checkpoints / "last.ckpt"
    if not last.exists():
        return None
    sha256_of(last)  # reads it to its end: is_zipfile would call a failing read no archive
    if is_zipfile(last):
        return str(last)
    aside = last.with_name("last.ckpt.torn")
    last.replace(aside)
    rank_zero_info(f"found a torn checkpoint; moved it to '{aside}', and the training begins anew")
    return None
