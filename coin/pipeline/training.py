"""The steps up to the experts: the shared initialisation, pretrained or imported, and every task's expert."""

from functools import partial
from pathlib import Path

from coin.core.processes import on_rank_zero, rank_zero_info
from coin.data import TaskData
from coin.data.tasks import task_with
from coin.errors import ConfigurationError
from coin.networks import import_checkpoint, initial_network, save_network
from coin.pipeline.config import BaseConfig
from coin.pipeline.experiment import Experiment
from coin.pipeline.jobs import by_stem, job
from coin.pipeline.records import Steps, folder_lock, step_key
from coin.pipeline.seed_run import SeedRun
from coin.pipeline.steps.train import train_network


def make_initial(experiment: Experiment) -> Path:
    """Make the shared initialisation, and return its file.

    There is one file per class count: experts with equal counts share the head, all experts share the other layers.
    Returns the file with the most classes.
    """
    base = experiment.base
    steps = Steps(experiment.layout.base)
    checkpoint = None if base is None or base.checkpoint is None else Path(base.checkpoint)
    if base is not None and base.task is not None:
        checkpoint = experiment.layout.pretrained
        task = task_with(base.task, image_size=experiment.network.image_size)
        options = {"network": experiment.network, "base": base, "task": task, "trainer": experiment.trainer}
        key = step_key(options)
        with folder_lock(steps.folder, patient=True), steps.alone("base", key):
            if not steps.finished("base", key, [checkpoint], shared=True):
                experiment.check_parts()
                rank_zero_info(f"base: pretraining {experiment.network.name} on {type(task).__name__}")
                _pretrain(experiment, base, task, key, steps, checkpoint)
    return _write_initial(experiment, steps, checkpoint)[-1]


def _pretrain(
    experiment: Experiment, base: BaseConfig, task: TaskData, key: str, steps: Steps, checkpoint: Path
) -> None:
    on_rank_zero(task.prepare_data)
    with job(experiment, "expert", "base", None, ["base"], task="base") as work:
        train_network(
            base,
            experiment.network,
            task,
            checkpoint,
            key=key,
            seed=base.seed,
            initial=None,
            trainer_options=experiment.trainer,
            loggers=work.loggers,
        )
        task.release()
        steps.finish("base", key, [checkpoint])
        work.log_artifacts("initialisation", by_stem(_write_initial(experiment, steps, checkpoint)))


def _write_initial(experiment: Experiment, steps: Steps, checkpoint: Path | None) -> list[Path]:
    """Write the shared initialisation for every class count, unless it is up to date."""
    counts = sorted({task.num_classes for task in experiment.tasks.values()})
    largest = experiment.layout.initial(counts[-1])
    for count in reversed(counts):
        path = experiment.layout.initial(count)
        # What a constructor draws depends on the class count, below the head too.
        wider = None if path == largest else largest
        key = step_key(
            {"network": experiment.network, "classes": count},
            [file for file in (checkpoint, wider) if file is not None],
        )
        with steps.alone(f"initial-{count}", key):
            save = partial(_save_initial, experiment, path, count, wider, checkpoint)
            steps.once(f"initial-{count}", key, [path], save, shared=True)
    return [experiment.layout.initial(count) for count in counts]


def _save_initial(experiment: Experiment, path: Path, count: int, wider: Path | None, checkpoint: Path | None) -> None:
    network = initial_network(experiment.network, count, checkpoint, wider=wider)
    save_network(path, network, experiment.network, count, {"made_by": "coin run", "base": str(checkpoint)})


def make_expert(run: SeedRun, name: str, *, patient: bool = False) -> None:
    """Train or import a task's expert; if `patient`, wait for another process that is training it."""
    experiment, task, output = run.experiment, run.tasks[name], run.layout.expert(name)
    initial = experiment.layout.initial(task.num_classes)
    if name in experiment.expert.checkpoints:
        given = Path(experiment.expert.checkpoints[name])
        if not given.is_file():
            raise ConfigurationError(f"found no file '{given}', expected an expert's weights; check expert.checkpoints")
        key = step_key({"network": experiment.network, "classes": list(task.classes)}, [given])
        run.steps.once(f"expert-{name}", key, [output], partial(_take_over, run, name, given), shared=True)
        return
    training = experiment.expert.of(name)
    key = _training_key(run, name)
    with folder_lock(output.parent, patient=patient), run.steps.alone(f"expert-{name}", key):
        if not needs_training(run, name):
            run.rank_zero_info(f"expert {name}: up to date")
            return
        run.rank_zero_info(f"expert {name}: fine-tuning for {training.epochs} epochs")
        with job(experiment, "expert", name, run.seed, [name], task=name) as work:
            work.use_artifacts("initialisation", by_stem([initial]))
            train_network(
                training,
                experiment.network,
                task,
                output,
                key=key,
                seed=run.seed,
                initial=initial,
                trainer_options=experiment.trainer,
                loggers=work.loggers,
                weights=training.weights,
            )
            work.log_artifacts("expert", {name: output})
        run.steps.finish(f"expert-{name}", key, [output])


def _take_over(run: SeedRun, name: str, given: Path) -> None:
    task, config = run.tasks[name], run.experiment.network
    network = import_checkpoint(config, task.num_classes, given)
    provenance = {"made_by": "coin run", "source": str(given), "task": name, "classes": list(task.classes)}
    save_network(run.layout.expert(name), network, config, task.num_classes, provenance)


def needs_training(run: SeedRun, name: str) -> bool:
    """Return whether a task's expert has yet to be trained."""
    if name in run.experiment.expert.checkpoints:
        return False
    key = _training_key(run, name)
    return not run.steps.finished(f"expert-{name}", key, [run.layout.expert(name)], shared=True)


def _training_key(run: SeedRun, name: str) -> str:
    experiment, task = run.experiment, run.tasks[name]
    options = {
        "training": experiment.expert.of(name),
        "task": task,
        "trainer": experiment.trainer,
        "seed": run.seed,
        "network": experiment.network,
    }
    return step_key(options, [experiment.layout.initial(task.num_classes)])
