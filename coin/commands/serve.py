"""``coin serve``: an experiment's experts and coded models behind the decoding front end, on Ray Serve."""

import json
import signal
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coin.coding import Decoder
from coin.commands.coded_system import Choice, CodedSystem, read_coded_system
from coin.commands.parser import parse_options
from coin.errors import CoinError, CoinWarning
from coin.serving.decodings import Decodings
from coin.serving.layout import spread_replicas
from coin.serving.model import NetworkServer
from coin.serving.policies import Policy, PolicyKind
from coin.serving.protocol import Description
from coin.serving.ray_app import RayOptions, System, check_port, ray_application, start
from coin.serving.replies import ReplyFormat


def serve(
    folder: str,
    choice: Choice,
    policy: PolicyKind | None = None,
    quantile: float = 0.9,
    ray: RayOptions = RayOptions(),  # noqa: B008 (frozen)
) -> None:
    """Serve an experiment until the process is told to stop.

    Args:
        folder: An experiment's folder, whose first seed is taken, or a seed's.
        choice: Which of the experiment's coded systems to serve.
        policy: Which servers a query asks; by default ``standin`` if the decoder needs no survivor (which that policy
            requires), else ``coded_hedged``. With ``hedged`` and ``replicated``, replicas of all experts replace the
            coded models, one per row of the code; with ``uncoded`` there are neither.
        quantile: The quantile of own answers' time after which they count as late.
        ray: Where and how to serve.
    """
    check_port(ray)
    system = read_system(folder, choice, policy, quantile)
    stop = start(system, ray)
    stopped = threading.Event()
    before = [signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        print(f"serving {', '.join(system.description.classes)} at http://{ray.host}:{ray.port}; Ctrl+C stops")
        stopped.wait()
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
        stop()


def read_system(folder: str, choice: Choice, policy: PolicyKind | None, quantile: float) -> System:
    """Return the system that `serve` serves, from the same arguments."""
    root = Path(folder)
    coded = read_coded_system(root, choice, alone=policy is PolicyKind.standin)
    default = PolicyKind.coded_hedged if coded.decoder.reads_survivors else PolicyKind.standin
    rule = Policy(policy or default, quantile)
    paths = {task: str(path.relative_to(root)) for task, path in coded.experts.paths.items()}
    width, decodings, promise = coded.experts.width, None, None
    probe = NetworkServer(root / paths[coded.tasks[0]], width, coded.decoder)
    widths = probe.feature_widths()
    processes = {f"expert-{task}": {f"expert-{task}": path} for task, path in paths.items()}
    if rule.coded:
        layout = coded.layout
        processes |= {
            f"coded-{row}": {f"coded-{row}": str(path.relative_to(root))} for row, path in enumerate(coded.coded)
        }
        classes = [len(own) for own in coded.classes.values()]
        promise, thresholds = coded.thresholds()
        decodings = Decodings(coded.code, _decoders(coded), None, classes, thresholds)
    else:
        replicas = 0 if rule.kind is PolicyKind.uncoded else coded.code.num_coded
        layout = spread_replicas(len(paths), replicas)
        for place in range(replicas):
            processes[f"replica-{place}"] = {f"replica-{place}-{task}": path for task, path in paths.items()}
    platform = f"coin ({rule.kind}, {coded.method}, {coded.decoder.name})" if rule.coded else f"coin ({rule.kind})"
    return System(
        folder=folder,
        processes=processes,
        layout=layout,
        policy=rule,
        expects=ReplyFormat(width, None if widths is None else sum(widths)),
        probe=probe.probe,
        decoder=coded.decoder,
        decodings=decodings,
        description=Description(
            coded.classes, probe.image_size, platform, probe.reads, coded.tokenizer, promise or None
        ),
    )


def _decoders(coded: CodedSystem) -> list[Decoder]:
    """Return the decoders of a system; decoders that need no fit work without calibration samples too."""
    try:
        return coded.fitted_decoders()
    except CoinError as error:
        unfitted = coded.unfitted_decoders()
        if unfitted[0].needs_fit:
            raise
        warnings.warn(f"decoded answers will have no risk estimate: {error}", CoinWarning, stacklevel=2)
        return unfitted


def application(args: dict[str, Any]) -> Any:
    """Return the Ray Serve application of a Serve YAML, whose ``args`` are the options of `serve`.

    ``import_path: coin.commands.serve:application``; see ``configs/serve/three-machines.yaml``.
    """
    plain = {name: value if isinstance(value, str) else json.dumps(value) for name, value in args.items()}
    options = _parsed([plain.pop("folder"), *(f"--{name}={value}" for name, value in plain.items())])
    ray = options.pop("ray")
    return ray_application(read_system(**options), ray)


def main(arguments: Sequence[str]) -> None:
    """Serve until the process is told to stop."""
    serve(**_parsed(arguments))


def _parsed(arguments: Sequence[str]) -> dict[str, Any]:
    return parse_options("serve", serve, arguments, choice=Choice)
