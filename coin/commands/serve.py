"""``coin serve``: an experiment's experts and coded models behind the decoding front end, on Ray Serve."""

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coin.commands.parser import parse_options
from coin.files.yaml import as_text
from coin.serving.policies import Policy, PolicyKind
from coin.serving.protocol import Description
from coin.serving.ray_app import RayOptions, check_port, ray_application, start
from coin.serving.servers import System, read_coded


def serve(
    folder: str,
    method: str | None = None,
    decoder: str | None = None,
    policy: PolicyKind | None = None,
    quantile: float = 0.9,
    ray: RayOptions = RayOptions(),  # noqa: B008 (frozen)
) -> None:
    """Serve an experiment until the process is told to stop.

    Args:
        folder: An experiment's folder, whose first seed is taken, or a seed's.
        method: The merge method whose coded models serve; by default that of the most accurate decoded answers.
        decoder: The decoder, as the results call it; by default the most accurate that the policy can use.
        policy: Which servers a query asks; by default ``standin`` if the decoder needs no survivor, else
            ``coded_hedged``. With ``replica`` all experts have second servers, with ``uncoded`` none.
        quantile: The quantile of own answers' time after which they count as late.
        ray: Where and how to serve.
    """
    check_port(ray)
    system, about = read_system(folder, method, decoder, policy, quantile)
    stop = start(system, about, ray)
    stopped = threading.Event()
    before = [signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        print(f"serving {', '.join(about.classes)} at http://{ray.host}:{ray.port}; Ctrl+C stops", flush=True)
        stopped.wait()
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
        stop()


def read_system(
    folder: str, method: str | None, decoder: str | None, policy: PolicyKind | None, quantile: float
) -> tuple[System, Description]:
    """Return the system that `serve` serves, and its description, from the same arguments."""
    coded = read_coded(Path(folder), method, decoder, policy)
    own = next(iter(coded.decoders.values())).config
    default = PolicyKind.coded_hedged if own.reads_survivors else PolicyKind.standin
    system = System.of(coded, Policy(policy or default, quantile))
    promises = [promise for each in coded.decoders.values() for promise in each.promises.values()]
    promise = {"alpha": promises[0].alpha, "confidence": promises[0].confidence} if promises else None
    platform = f"coin ({system.policy.kind}, {coded.method}, {own.name})"
    classes = dict(zip(coded.names, coded.class_names or (), strict=True))
    size = system.network(system.stand_ins.experts[0]).image_size
    return system, Description(classes, size, platform, promise)


def application(args: dict[str, Any]) -> Any:
    """Return the application of a Serve YAML such as ``configs/serve/three-machines.yaml``: ``args`` are `serve`'s."""
    given = [f"--{name}={as_text(value)}" for name, value in args.items() if name != "folder"]
    options = parse_options("serve", serve, [args["folder"], *given])
    ray = options.pop("ray")
    return ray_application(*read_system(**options), ray)


def main(arguments: Sequence[str]) -> None:
    """Serve until the process is told to stop."""
    serve(**parse_options("serve", serve, arguments))
