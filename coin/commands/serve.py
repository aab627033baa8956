"""``coin serve``: an experiment's experts and coded models behind the decoding front end, on Ray Serve."""

import signal
import sys
import threading
import warnings
from pathlib import Path

from coin.coding.decoder_config import REPLICA
from coin.core.choices import check_number
from coin.core.ray_cluster import set_ray_variables
from coin.errors import CoinWarning, ConfigurationError
from coin.files.packaged import extra_module
from coin.files.safetensors import load_provenance
from coin.modules import Coded
from coin.reporting.choice import recommended, weakness
from coin.reporting.standins import standins
from coin.reporting.summary import read_run, seed_folders
from coin.serving.policies import POLICIES, PolicyKind
from coin.serving.ray_app import RayOptions, check_port, start
from coin.serving.system import System


def serve(
    folder: str,
    method: str | None = None,
    decoder: str | None = None,
    policy: PolicyKind | None = None,
    quantile: float = 0.8,
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
    system = read_system(folder, method, decoder, policy, quantile)
    set_ray_variables(ray.address)
    extra_module("ray.serve", "serve")  # an error where it is not installed
    servers = ", ".join(system.stand_ins.servers)
    print(
        f"starting Ray with a front end and the servers {servers} ({system.variant}; policy "
        f"{system.stand_ins.policy})",
        file=sys.stderr,
        flush=True,
    )
    stop = start(system, ray)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    tasks = ", ".join(system.classes)
    print(f"serving {tasks} at http://{ray.host}:{ray.port}; Ctrl+C stops", flush=True)
    stopped.wait()
    stop()


def read_system(
    folder: str,
    method: str | None,
    decoder: str | None,
    policy: PolicyKind | None,
    quantile: float,
) -> System:
    """Return the system that `serve` serves, from the same arguments; warns where nothing can be recommended."""
    check_number("quantile", quantile, low=0, high=1)
    run = Path(folder)
    if method is not None:
        return _read_system(run, method, decoder, policy, quantile)
    if decoder is not None or policy is not None:
        return _read_system(run, None, decoder, policy, quantile)
    system = _read_system(run, recommended_copies(run), None, None, quantile)
    kept = standins(read_run(run)[1])
    found = "" if kept.empty else weakness(recommended(kept))
    if found:
        warning = f"nothing can be recommended: {found}; serving {system.variant} all the same"
        warnings.warn(warning, CoinWarning, stacklevel=2)
    return system


def _read_system(
    run: Path,
    method: str | None,
    decoder: str | None,
    policy: PolicyKind | None,
    quantile: float,
) -> System:
    if method is not None and method.startswith(f"{REPLICA}-"):
        policy = policy or PolicyKind.replica
        if decoder is not None or POLICIES[policy][0] != "replica":
            raise ConfigurationError(
                f"found method '{method}' with policy {policy} and decoder {decoder}, "
                "expected policy replica or replica_proactive and no decoder; leave them out"
            )
        coded = Coded.from_run(run)
        how = method.removeprefix(f"{REPLICA}-")
        place = seed_folders(run)[0] / "replicas"
        copies = [place / f"{task}.{how}.safetensors" for task in coded.names]
        for path in copies:
            load_provenance(path)  # a FileError where it is not there
        return System.of(coded, policy, quantile, method, copies)
    # Whether the decoder reads survivors; nobody and replicas have none.
    reads_survivors = {"coded": False, "everyone": True}
    survivors = reads_survivors.get(POLICIES[policy][0]) if policy else None
    coded = Coded.from_run(run, method, decoder, survivors)
    kind = next(iter(coded.decoders.values())).kind
    default = PolicyKind.coded_hedged if kind.reads_survivors else PolicyKind.standin
    return System.of(coded, policy or default, quantile, f"{coded.method}, {kind}")


def recommended_copies(folder: Path) -> str | None:
    """Return the name of the compressed copies that are recommended of a run, else None, for `coin.Coded.from_run`."""
    kept = standins(read_run(folder)[1])
    if kept.empty or recommended(kept).decoder != REPLICA:
        return None
    return str(recommended(kept).method)
