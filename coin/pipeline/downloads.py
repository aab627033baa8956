"""What an experiment downloads before it starts."""

from coin.data.task import TaskData
from coin.files.downloads import Download, check_downloads, fetch_from_hub
from coin.networks.hub import PREFIX, HuggingFace, local_place
from coin.pipeline.experiment import Experiment


def downloads(experiment: Experiment) -> list[Download]:
    """Return the data sets, the network's weights and the experts that come from the network, here or not."""
    counts = {task.num_classes for task in experiment.tasks.values()}
    written = all(experiment.layout.initial(count).is_file() for count in counts)
    taken = experiment.base is not None or written  # then the network's own weights are not read again
    source = experiment.network.source
    of_network = [each for each in source.downloads(_experts(experiment)) if source.zero_shot or not taken]
    return [*(each for task in every_task(experiment) for each in task.downloads()), *of_network]


def fetch(experiment: Experiment) -> None:
    """Download what is missing of experts and of CLIP; a FileError in one line that names all that cannot be.

    Data sets and other weights are downloaded where they are read.
    """
    check_downloads(downloads(experiment))
    source = experiment.network.source
    own = [source.place] if isinstance(source, HuggingFace) and source.zero_shot and source.weights is not None else []
    for place in (*own, *_experts(experiment)):
        fetch_from_hub(place)


def every_task(experiment: Experiment) -> list[TaskData]:
    """Return the tasks of an experiment, that of its base among them."""
    base = experiment.base
    return [*experiment.tasks.values(), *([base.task] if base is not None and base.task is not None else [])]


def _experts(experiment: Experiment) -> list[str]:
    given = experiment.expert.checkpoints.values()
    return list(dict.fromkeys(local_place(place) for place in given if place.startswith(PREFIX)))
