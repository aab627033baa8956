"""``coin serve``: an experiment's experts and coded models behind the decoding front end, on Ray Serve."""

import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coin.coding import Answers, Decoder, make_decoder
from coin.commands.parser import command_parser, parsed
from coin.commands.run import experiment_of
from coin.commands.served import Served, read_served
from coin.data import Calibration
from coin.data.tasks import Tasks, task_with
from coin.errors import FileError
from coin.modules import Coded
from coin.networks import load_network
from coin.serving.decodings import Decodings
from coin.serving.layout import spread_copies
from coin.serving.model import NetworkServer
from coin.serving.policies import PolicyKind, make_policy
from coin.serving.ray_engine import RayOptions, System, start
from coin.serving.replies import ReplyFormat
from coin.serving.service import Description


def serve(
    folder: str,
    method: str | None = None,
    batchnorm: str | None = None,
    decoder: str = "linear",
    policy: PolicyKind = PolicyKind.coded_hedged,
    quantile: float = 0.9,
    ray: RayOptions = RayOptions(),  # noqa: B008 (frozen)
    say: Callable[[str], None] = print,
) -> None:
    """Serve an experiment until the process is told to stop.

    Args:
        folder: An experiment's folder, whose first seed is taken, or a seed's.
        method: The merge method whose coded models serve; none takes the first one in the results.
        batchnorm: The BatchNorm policy that its run asked for; none takes its first one.
        decoder: The decoder, as the results call it. A calibrated one is fitted anew on the experiment's calibration
            samples.
        policy: Decides whom a query asks.
        quantile: Of the time that own answers take, after which the coded policies take them for late.
        ray: Where and how to serve.
        say: Tells the user.

    Raises:
        ConfigurationError: Ray is not installed, or an option is wrong.
        FileError: A file is missing or damaged.
        ServingError: Ray cannot serve here.
    """
    system = read_system(folder, method, batchnorm, decoder, policy, quantile)
    if ray.faults:
        say("with faults put in on purpose; leave out --ray.faults for a sound system")
    stop = start(system, ray)
    stopped = threading.Event()
    before = [signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        say(f"serving {', '.join(system.description.classes)} at http://{ray.host}:{ray.port}; Ctrl+C stops")
        stopped.wait()
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
        stop()


def read_system(
    folder: str,
    method: str | None,
    batchnorm: str | None,
    decoder: str,
    policy: PolicyKind | str,
    quantile: float,
) -> System:
    """Return what `serve` serves; the arguments are its own."""
    chosen = make_policy(policy, quantile)
    served = read_served(Path(folder), method, batchnorm, decoder)
    experts = list(served.experts.paths.values())
    width = served.experts.width
    probe = NetworkServer(experts[0], width, served.decoder)
    widths = probe.feature_widths()
    names = [f"expert-{task}" for task in served.tasks]
    fitted = []
    if chosen.coded:
        names += [f"coded-{row}" for row in range(served.code.num_coded)]
        if make_decoder(served.decoder, served.code, [0]).needs_fit:
            fitted = fit_decoders(served, read_tasks(served).calibration())
    decodings = Decodings(served.code, fitted, widths if served.decoder.reads_stages else None)
    layout = decodings.layout() if chosen.coded else spread_copies(served.code.num_experts, served.code.num_coded)
    names += [f"copy-{place}-{served.tasks[expert]}" for place, expert in enumerate(layout.copies)]
    return System(
        paths=(*experts, *(served.coded if chosen.coded else ()), *(experts[expert] for expert in layout.copies)),
        names=tuple(names),
        layout=layout,
        policy=chosen,
        expects=ReplyFormat(width, None if widths is None else sum(widths)),
        decoder=served.decoder,
        decodings=decodings,
        description=Description(served.classes, probe.image_size, served.method, served.decoder.name),
    )


def fit_decoders(served: Served, calibration: Calibration) -> list[Decoder]:
    """Return the decoders of every loss that the code promises to make up for, as the evaluation fits them."""
    config = served.decoder
    coded = Coded(served.code, served.experts.networks, [load_network(path).network for path in served.coded])
    parts = [coded.answers(batch, features=config.reads_features, stages=config.reads_stages) for batch in calibration]
    answers = replace(Answers.concatenate(parts), tasks=calibration.part)
    return [make_decoder(config, served.code, erased).fit(answers) for erased in served.code.erasures()]


def read_tasks(served: Served) -> Tasks:
    """Return the tasks of the seed that is served, with their images, from the configuration that it has left."""
    path = served.folder / "config.yaml"
    if not path.is_file():
        raise FileError(f"found no '{path}', which says what the tasks are; use --decoder=linear, or coin run")
    experiment = experiment_of(["-c", str(path)])
    options: dict[str, Any] = {"seed": experiment.seeds[0]}
    tasks = {name: task_with(experiment.tasks[name], **options) for name in served.tasks}
    data = Tasks(tasks, experiment.calibration.samples_per_task, experiment.calibration.batch_size)
    data.prepare_data()
    data.setup()
    return data


def main(arguments: Sequence[str]) -> None:
    """Serve until the process is told to stop."""
    parser = command_parser("serve")
    parser.add_argument("folder", type=str, help="An experiment's or a seed's folder.")
    parser.add_function_arguments(serve, skip={"folder", "say"})
    serve(**parsed(parser, arguments))
