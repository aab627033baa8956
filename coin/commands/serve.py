"""``coin serve``: an experiment's experts and coded models behind the decoding front end, on Ray Serve."""

import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

from coin.coding import Promise
from coin.coding.decoder_config import REPLICA
from coin.commands.parser import parse_options
from coin.errors import CoinWarning, ConfigurationError
from coin.modules import Coded
from coin.reporting.choice import in_words, recommended, weakness
from coin.reporting.standins import standins
from coin.reporting.summary import REFERENCES, read_run
from coin.serving.policies import Policy, PolicyKind
from coin.serving.protocol import Description
from coin.serving.ray_app import RayOptions, check_port, start
from coin.serving.servers import System, read_coded, read_copies


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
        method: The merge method whose coded models serve, or the name of compressed copies, such as
            ``replica-3bit-int8base``, which a replica holds then; by default what `coin choose` recommends.
        decoder: The decoder, as the results call it; by default the recommended one of those that the policy can use.
        policy: Which servers a query asks; by default ``standin`` if the decoder needs no survivor, else
            ``coded_hedged``. With ``replica`` all experts have second servers, with ``uncoded`` none.
        quantile: The quantile of own answers' time after which they count as late.
        ray: Where and how to serve.
    """
    check_port(ray)
    system, about = read_system(folder, method, decoder, policy, quantile)
    servers = len(system.stand_ins.processes)
    print(f"starting Ray with {servers} servers and a front end", file=sys.stderr, flush=True)
    stop = start(system, about, ray)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    tasks = ", ".join(about.classes)
    print(f"serving {tasks} at http://{ray.host}:{ray.port}; Ctrl+C stops", flush=True)
    stopped.wait()
    stop()


def read_system(
    folder: str,
    method: str | None,
    decoder: str | None,
    policy: PolicyKind | None,
    quantile: float,
) -> tuple[System, Description]:
    """Return the system that `serve` serves, and its description, from the same arguments."""
    run = Path(folder)
    if method is None and decoder is None and policy is None:
        method = served_by_default(run)
    if method is not None and method.startswith(f"{REPLICA}-"):
        kind = policy or PolicyKind.replica
        if decoder is not None or Policy(kind).which != "replica":
            raise ConfigurationError(
                f"found method '{method}' with policy {kind} and decoder {decoder}, "
                "expected policy replica or replica_proactive and no decoder; leave them out"
            )
        coded = read_coded(run, None, None, kind)
        copies = read_copies(run, method, coded.names)
        system = System.of(coded, Policy(kind, quantile), copies)
        # None is about the answers of copies.
        return system, _description(coded, system, method, promises=[])
    coded = read_coded(run, method, decoder, policy)
    fitted = list(coded.decoders.values())
    default = PolicyKind.coded_hedged if fitted[0].kind.reads_survivors else PolicyKind.standin
    system = System.of(coded, Policy(policy or default, quantile))
    promises = [promise for own in fitted for promise in own.promises.values()]
    variant = f"{coded.method}, {fitted[0].kind}"
    return system, _description(coded, system, variant, promises)


def _description(
    coded: Coded, system: System, variant: str, promises: Sequence[Promise]
) -> Description:
    classes = dict(zip(coded.names, coded.class_names or (), strict=True))
    image_size = system.network(system.stand_ins.experts[0]).image_size
    platform = f"coin ({system.policy.kind}, {variant})"
    promise = None
    if promises:
        promise = {"alpha": promises[0].alpha, "confidence": promises[0].confidence}
    return Description(classes, image_size, platform, promise)


def served_by_default(folder: Path) -> str | None:
    """Return the name of the compressed copies that are recommended of a run; None where another stand-in is.

    That is the one that `coin.Coded.from_run` takes. The survivors alone need no server more: then the next best is
    served, and a warning says so.
    """
    kept = standins(read_run(folder)[1])
    if kept.empty:
        return None
    row = recommended(kept)
    if weakness(row):
        warnings.warn(f"nothing can be recommended: {weakness(row)}", CoinWarning, stacklevel=2)
    if row["method"] == REFERENCES[0]:
        message = f"{in_words(row)} would do, and need no server more; serving the recommended one of the others"
        warnings.warn(message, CoinWarning, stacklevel=2)
    if row["decoder"] != REPLICA:
        return None
    return str(row["method"])


def main(arguments: Sequence[str]) -> None:
    """Serve until the process is told to stop."""
    serve(**parse_options("serve", serve, arguments))
