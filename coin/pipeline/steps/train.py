"""The training of one network on one task: the base, and the experts."""

import shutil
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from coin.callbacks import ExpertExport, Weights
from coin.core.choices import check_integer
from coin.core.processes import on_rank_zero
from coin.data import Augmentation, TaskData
from coin.data.augmentation import TransformSpec, build_transforms
from coin.data.tasks import task_with
from coin.errors import FileError
from coin.files.atomic import hashes, write_text
from coin.files.checkpoints import check_training_checkpoint
from coin.modules import Expert
from coin.networks import NetworkConfig, import_checkpoint, import_pretrained, initial_network, save_network
from coin.networks.hub import PREFIX
from coin.networks.recipe import Recipe
from coin.pipeline.step import Context
from coin.pipeline.steps.trainer import make_trainer


@dataclass(frozen=True)
class TrainingConfig(Recipe):
    """How a network is trained; tuned values are in the YAML files.

    The options of `coin.networks.recipe.Recipe` are those of ``coin fit`` as well.

    Args:
        epochs: Passes over the training split.
        batch_size: Samples per step and process.
        augmentation: The augmentation of training images: ``none``, ``crop``, ``crop_flip`` or ``shift``.
        transform: Transforms applied after the augmentation, classes of ``torchvision.transforms.v2`` by class path;
            None uses the task's own option, an empty list applies none. See `coin.data.TaskData`.
    """

    _ENUMS: ClassVar[dict[str, type[StrEnum]]] = {**Recipe._ENUMS, "augmentation": Augmentation}

    epochs: int = 3
    batch_size: int = 64
    augmentation: Augmentation = Augmentation.none
    transform: TransformSpec = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("epochs", self.epochs, 1)
        check_integer("batch_size", self.batch_size, 2)
        build_transforms(self.transform)


def train_network(
    context: Context,
    config: TrainingConfig,
    network: NetworkConfig,
    task: TaskData,
    *,
    seed: int,
    name: str | None = None,
    initial: Path | None = None,
) -> None:
    """Train one network on one task and write it as a safetensors file, with checkpoints in the same folder.

    An interrupted run resumes from its last complete epoch, if the step's key is the same. The seed is that of the
    samples' order and of dropout. The base has no `name`, and no `initial`: it starts from the network's own weights.
    """
    (output,) = context.outputs
    on_rank_zero(task.prepare_data)
    weights = getattr(config, "weights", Weights.last)
    checkpoints = output.parent / "checkpoints"
    last = on_rank_zero(lambda: _begin(checkpoints, context.key, output))
    data = task_with(
        task,
        seed=seed,
        batch_size=config.batch_size,
        augmentation=config.augmentation,
        transform=task.transform if config.transform is None else config.transform,
    )
    module = Expert(
        network=network.name,
        image_size=network.image_size,
        weights=None if initial is not None else network.weights,
        options=network.options,
        num_classes=data.num_classes,
        initial=None if initial is None else str(initial),
        seed=seed,
        **{option.name: getattr(config, option.name) for option in fields(Recipe)},
    )
    export = ExpertExport(str(output), weights, name)
    callbacks: list[Callback] = [export]
    if weights == Weights.best:
        callbacks.append(ModelCheckpoint(checkpoints, monitor="val/accuracy", mode="max"))
    # Lightning's save_last would write only where another checkpoint is written: where none is the best, nowhere.
    callbacks.append(ModelCheckpoint(checkpoints, "last", enable_version_counter=False))
    trainer = make_trainer(
        checkpoints,
        context.trainer,
        max_epochs=config.epochs,
        callbacks=callbacks,
        logger=context.loggers or False,
        enable_checkpointing=True,
        log_every_n_steps=10,
    )
    seed_everything(seed, workers=True, verbose=False)
    trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
    if not on_rank_zero(output.is_file):
        # The checkpoint was of a finished training, killed before the export: Lightning restores it and trains nothing.
        export.on_train_end(trainer, module)
    if initial is None:
        task.release()  # the base's task is not read again


def write_initial(
    context: Context, network: NetworkConfig, classes: int, wider: Path | None, checkpoint: Path | None
) -> None:
    """Write the shared initialisation for a number of classes, by default with the network's own weights.

    Its body is that of `wider`, the file of the initialisation with the most classes.
    """
    initial = initial_network(network, classes, checkpoint, wider=wider)
    read = hashes(each for each in (checkpoint, wider, network.weights_file) if each)
    made = {"made_by": "coin run", "base": str(checkpoint), "sha256": read}
    save_network(context.outputs[0], initial, network, classes, made)


def import_expert(
    context: Context, config: NetworkConfig, name: str, task: TaskData, place: str, initial: Path
) -> None:
    """Write a task's expert from the user's file of weights, or from a folder or ID of Hugging Face's (``hf/…``)."""
    if place.startswith(PREFIX):
        network = import_pretrained(config, place, initial, task.zero_shot, name)
    else:
        network = import_checkpoint(config, task.num_classes, Path(place))
    made: dict[str, Any] = {"made_by": "coin run", "source": place, "task": name, "classes": list(task.classes)}
    made |= {"sha256": hashes(context.inputs), **({} if task.head is None else {"head": task.head})}
    save_network(context.outputs[0], network, config, task.num_classes, made)


def _begin(checkpoints: Path, key: str, output: Path) -> str | None:
    """Remove the files of another training, and return the checkpoint to resume from."""
    mark, last = checkpoints / "step-key", checkpoints / "last.ckpt"
    if not mark.is_file() or mark.read_text(encoding="utf-8", errors="replace") != key:
        if checkpoints.is_dir():
            shutil.rmtree(checkpoints)
        write_text(mark, key)
    output.unlink(missing_ok=True)
    try:
        check_training_checkpoint(last)
    except FileError:  # Lightning copies it across file systems, and may be killed at that
        last.unlink(missing_ok=True)
        return None
    return str(last)
