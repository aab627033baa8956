"""``coin serve``: an experiment's experts and coded models behind the decoding front end, on Ray Serve."""

import json
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from coin.coding import Answers, Decoder, make_decoder
from coin.commands.parser import command_parser, parsed
from coin.commands.run import experiment_of
from coin.commands.served import Served, read_served
from coin.data import Calibration
from coin.data.tasks import Tasks, task_with
from coin.errors import ConfigurationError, FileError
from coin.experiment import Experiment
from coin.modules import Coded
from coin.networks import load_network
from coin.serving.decodings import Decodings
from coin.serving.layout import spread_spares
from coin.serving.model import NetworkServer
from coin.serving.policies import Policy, PolicyKind
from coin.serving.protocol import Description
from coin.serving.ray_app import RayOptions, System, application as ray_application, start
from coin.serving.replies import ReplyFormat


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
        policy: Decides whom a query asks. With ``hedged`` and ``replicated`` spares hold every expert, as many
            as the code has rows, in place of the coded models; with ``uncoded`` there is neither.
        quantile: Of the time that own answers take, after which they are late.
        ray: Where and how to serve.
        say: Tells the user.

    Raises:
        ConfigurationError: Ray is not installed, or an option is wrong.
        FileError: A file is missing or damaged.
        ServingError: Ray cannot serve here.
    """
    system = read_system(folder, method, batchnorm, decoder, policy, quantile)
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
    chosen = Policy(PolicyKind(policy), quantile)
    root = Path(folder)
    served = read_served(root, method, batchnorm, decoder)
    paths = list(served.experts.paths.values())
    width = served.experts.width
    probe = NetworkServer(paths[0], width, served.decoder)
    widths = probe.feature_widths()
    fitted = []
    if chosen.coded and make_decoder(served.decoder, served.code, [0]).needs_fit:
        fitted = fit_decoders(served, read_tasks(served).calibration())
    decodings = Decodings(served.code, fitted, widths if served.decoder.reads_stages else None)
    count, extras = len(served.tasks), served.code.num_coded
    held = [(f"expert-{task}", [path]) for task, path in zip(served.tasks, paths, strict=True)]
    if chosen.coded:
        layout = decodings.layout()
        held += [(f"coded-{row}", [path]) for row, path in enumerate(served.coded)]
    else:
        layout = spread_spares(count, 0 if chosen.kind is PolicyKind.uncoded else extras)
        held += [(f"spare-{place}", paths) for place in range(len(layout.copies) // count)]
    places = [(process, place) for process, (_, networks) in enumerate(held) for place in range(len(networks))]
    spares = [f"{held[process][0]}-{served.tasks[place]}" for process, place in places[count:]]
    return System(
        folder=folder,
        processes=tuple((name, tuple(str(path.relative_to(root)) for path in networks)) for name, networks in held),
        places=tuple(places),
        names=(*(name for name, _ in held),) if chosen.coded else (*(name for name, _ in held[:count]), *spares),
        layout=layout,
        policy=chosen,
        expects=ReplyFormat(width, None if widths is None else sum(widths)),
        probe=probe.probe,
        decoder=served.decoder,
        decodings=decodings,
        description=Description(
            served.classes, probe.image_size, served.method, served.decoder.name, probe.reads, tokenizer_of(served)
        ),
    )


def tokenizer_of(served: Served) -> str | None:
    """Return the tokenizer of a served system for texts; none for images, and for the packaged encoder's.

    Raises:
        ConfigurationError: Tasks have tokenizers of their own, which no one front end can read texts with.
    """
    if next(iter(served.experts.opened.values())).config.reads != "texts":
        return None
    tasks = served_experiment(served).tasks
    found = {getattr(tasks[name], "tokenizer", None) for name in served.tasks}
    if len(found) > 1:
        raise ConfigurationError(f"found tokenizers {found}, expected one for all tasks; train them with one")
    tokenizer: str | None = found.pop()
    return tokenizer


def fit_decoders(served: Served, calibration: Calibration) -> list[Decoder]:
    """Return the decoders of every loss that the code promises to make up for, as the evaluation fits them."""
    config = served.decoder
    coded = Coded(served.code, served.experts.networks, [load_network(path).network for path in served.coded])
    parts = [coded.answers(batch, features=config.reads_features, stages=config.reads_stages) for batch in calibration]
    answers = replace(Answers.concatenate(parts), tasks=calibration.part)
    return [make_decoder(config, served.code, erased).fit(answers) for erased in served.code.erasures()]


def served_experiment(served: Served) -> Experiment:
    """Return the experiment that the served seed's configuration describes."""
    path = served.folder / "config.yaml"
    if not path.is_file():
        raise FileError(f"found no '{path}', which says what the tasks are; use --decoder=linear, or coin run")
    return experiment_of(["-c", str(path)])


def read_tasks(served: Served) -> Tasks:
    """Return the tasks of the seed that is served, with their images, from the configuration that it has left."""
    experiment = served_experiment(served)
    options: dict[str, Any] = {"seed": experiment.seeds[0]}
    tasks = {name: task_with(experiment.tasks[name], **options) for name in served.tasks}
    data = Tasks(tasks, experiment.calibration.samples_per_task, experiment.calibration.batch_size)
    data.prepare_data()
    data.setup()
    return data


def application(args: dict[str, Any]) -> Any:
    """Return the Ray Serve application of a Serve YAML, whose ``args`` are the options of `serve`.

    ``import_path: coin.commands.serve:application``; see ``configs/serve/three-machines.yaml``.
    """
    parser = _parser()
    plain = {name: value if isinstance(value, str) else json.dumps(value) for name, value in args.items()}
    arguments = [plain.pop("folder"), *(f"--{name}={value}" for name, value in plain.items())]
    options = parsed(parser, arguments)
    ray = options.pop("ray")
    return ray_application(read_system(**options), ray.resources, ray.limits, ray.inputs)


def main(arguments: Sequence[str]) -> None:
    """Serve until the process is told to stop."""
    serve(**parsed(_parser(), arguments))


def _parser() -> ArgumentParser:
    parser = command_parser("serve")
    parser.add_argument("folder", type=str, help="An experiment's or a seed's folder.")
    parser.add_function_arguments(serve, skip={"folder", "say"})
    return parser
