"""``coin serve``: an experiment's experts and coded models behind the decoding front end, on Ray Serve."""

import signal
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coin.coding.decoder_config import REPLICA
from coin.commands.parser import parse_options
from coin.core.choices import check_number
from coin.errors import CoinWarning, ConfigurationError
from coin.files.yaml import as_text
from coin.reporting.choice import recommended, weakness
from coin.reporting.summary import REFERENCES, read_run, stand_ins, summarise
from coin.reporting.text import read_by
from coin.serving.policies import Policy, PolicyKind
from coin.serving.protocol import Description
from coin.serving.ray_app import RayOptions, check_port, ray_application, start
from coin.serving.servers import System, read_coded, read_copies


def serve(
    folder: str,
    method: str | None = None,
    decoder: str | None = None,
    policy: PolicyKind | None = None,
    quantile: float = 0.9,
    keep_mib: float = 0.0,
    ray: RayOptions = RayOptions(),  # noqa: B008 (frozen)
) -> None:
    """Serve an experiment until the process is told to stop.

    Args:
        folder: An experiment's folder, whose first seed is taken, or a seed's.
        method: The merge method whose coded models serve, or the name of compressed copies, such as
            ``replica-3bit-int8base``, which a replica holds then; by default what `coin choose` recommends.
        decoder: The decoder, as the results call it; by default the recommended one of those that the policy can use.
        policy: Which servers a query asks; by default ``standin`` if the decoder needs no survivor, else
            ``coded_hedged``. With ``replica`` all experts have second servers, with ``uncoded`` none.
        quantile: The quantile of own answers' time after which they count as late.
        keep_mib: How many MiB of unpacked networks the server of a body with adapters, or of compressed copies, keeps:
            those of the experts that were asked for last. With 0 a body stays packed, and one copy is unpacked.
        ray: Where and how to serve.
    """
    check_port(ray)
    system, about = read_system(folder, method, decoder, policy, quantile, keep_mib)
    stop = start(system, about, ray)
    stopped = threading.Event()
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda *_: stopped.set())
    experts = ", ".join(about.classes)
    try:
        print(f"serving {experts} at http://{ray.host}:{ray.port}; Ctrl+C stops", flush=True)
        stopped.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop()


def read_system(
    folder: str,
    method: str | None,
    decoder: str | None,
    policy: PolicyKind | None,
    quantile: float,
    keep_mib: float = 0.0,
) -> tuple[System, Description]:
    """Return the system that `serve` serves, and its description, from the same arguments."""
    check_number("keep_mib", keep_mib, low=0)
    if method is None and decoder is None and policy is None:
        method, decoder = served_by_default(Path(folder))
    copies: list[Path] = []
    if method is not None and method.startswith(f"{REPLICA}-"):
        policy = policy or PolicyKind.replica
        if decoder is not None or Policy(policy).which != "replica":
            found = f"found method '{method}' with policy {policy} and decoder {decoder}"
            expected = "expected policy replica or replica_proactive and no decoder"
            raise ConfigurationError(f"{found}, {expected}; leave them out")
        coded = read_coded(Path(folder), None, None, policy)
        copies = read_copies(Path(folder), method, coded)
    else:
        coded = read_coded(Path(folder), method, decoder, policy)
    config = next(iter(coded.decoders.values())).config
    if policy is None:
        policy = PolicyKind.coded_hedged if config.reads_survivors else PolicyKind.standin
    system = System.of(coded, Policy(policy, quantile), copies, keep_mib)
    if keep_mib > 0 and coded.is_adapted and system.policy.which == "coded":
        system.network(system.stand_ins.of[0][0])  # refuses fewer MiB than one network takes
    promise = None
    if not copies:  # a promise is about the coded model's answers
        promises = [promise for own in coded.decoders.values() for promise in own.promises.values()]
        if promises:
            promise = {"alpha": promises[0].alpha, "confidence": promises[0].confidence}
    served = method if copies else f"{coded.method}, {config.name}"
    platform = f"coin ({policy}, {served})"
    classes = dict(zip(coded.names, coded.class_names or (), strict=True))
    size = system.network(system.stand_ins.experts[0]).image_size
    return system, Description(classes, size, platform, promise)


def served_by_default(folder: Path) -> tuple[str | None, str | None]:
    """Return the method and the decoder of what is recommended of a run; no decoder where it is compressed copies.

    The survivors alone need no server more: then the next best is served, and a warning says so. Both are None there,
    and for results from before memory was measured.
    """
    kept = stand_ins(summarise(read_run(folder)[1]))
    if kept.empty:
        return None, None
    row = recommended(kept)
    if weakness(row):
        warnings.warn(f"nothing can be recommended: {weakness(row)}", CoinWarning, stacklevel=2)
    if row["name"] == REFERENCES[0]:
        enough = f"{read_by(row)} would do, and need no server more"
        warnings.warn(f"{enough}; serving the recommended one of the others", CoinWarning, stacklevel=2)
        return None, None
    decoder = None if row["decoder"] == REPLICA else str(row["decoder"])
    return str(row["name"]).partition("[")[0], decoder


def application(args: dict[str, Any]) -> Any:
    """Return the application of a Serve YAML such as ``configs/serve/three-machines.yaml``: ``args`` are `serve`'s."""
    given = [f"--{name}={as_text(value)}" for name, value in args.items() if name != "folder"]
    options = parse_options("serve", serve, [args["folder"], *given])
    ray = options.pop("ray")
    return ray_application(*read_system(**options), ray)


def main(arguments: Sequence[str]) -> None:
    """Serve until the process is told to stop."""
    serve(**parse_options("serve", serve, arguments))
