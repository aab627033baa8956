"""The step that makes one task's expert: trains it, or takes over one that was brought along."""

from pathlib import Path

from coin.data import TaskData
from coin.errors import ConfigurationError
from coin.experiment.jobs import FileKind
from coin.experiment.locks import alone_in
from coin.experiment.seed_run import SeedRun
from coin.experiment.store import step_key
from coin.networks import brought_network, save_network
from coin.processes import from_first
from coin.steps.train import train_network


def make_expert(run: SeedRun, name: str, *, patient: bool = False) -> None:
    """Train a task's expert, or take over one that was brought along.

    Args:
        run: The seed.
        name: The task.
        patient: Whether to wait for another process that is training it.
    """
    experiment, task, output = run.experiment, run.tasks[name], run.expert_path(name)
    initial = experiment.initial_path(task.num_classes)
    config = experiment.expert
    given = config.checkpoints.get(name)
    if given is not None:
        key = step_key({"network": experiment.network, "classes": list(task.classes)}, [_existing(given)])
        if not run.steps.finished(f"expert-{name}", key, [output], shared=True):
            from_first(lambda: _take_over(run, name, task, Path(given)))
            run.steps.finish(f"expert-{name}", key, [output])
        return
    training = config.of(name)
    key = _training_key(run, name, task)
    with alone_in(output.parent, patient=patient), run.steps.alone(f"expert-{name}", key):
        if run.steps.finished(f"expert-{name}", key, [output], shared=True):
            run.say(f"expert {name}: up to date")
            return
        run.say(f"expert {name}: fine-tuning for {training.epochs} epochs")
        with run.job("expert", name, [name], task=name) as work:
            work.reads(FileKind.initialisation, {initial.stem: initial})
            train_network(
                training,
                experiment.network,
                task,
                output.parent,
                output,
                key=key,
                seed=run.seed,
                initial=initial,
                trainer_options=experiment.trainer,
                loggers=work.loggers,
                weights=training.weights,
            )
            work.makes(FileKind.expert, {name: output})
        run.steps.finish(f"expert-{name}", key, [output])


def lacks_expert(run: SeedRun, name: str) -> bool:
    """Return whether a task's expert is still to be trained."""
    if name in run.experiment.expert.checkpoints:
        return False
    key = _training_key(run, name, run.tasks[name])
    return not run.steps.finished(f"expert-{name}", key, [run.expert_path(name)], shared=True)


def _training_key(run: SeedRun, name: str, task: TaskData) -> str:
    experiment = run.experiment
    options = {
        "training": experiment.expert.of(name),
        "task": task,
        "trainer": experiment.trainer,
        "seed": run.seed,
        "network": experiment.network,
    }
    return step_key(options, [experiment.initial_path(task.num_classes)])


def _take_over(run: SeedRun, name: str, task: TaskData, given: Path) -> None:
    network = brought_network(run.experiment.network, task.num_classes, given)
    provenance = {"made_by": "coin run", "source": str(given), "task": name, "classes": list(task.classes)}
    save_network(run.expert_path(name), network, run.experiment.network, task.num_classes, provenance)


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise ConfigurationError(f"found no file '{path}', expected an expert's weights; check expert.checkpoints")
    return Path(path)
