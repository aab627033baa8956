"""``coin simulate``: latency and accuracy of the answers, for every kind of stand-in."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from coin.coding import DecoderConfig, DecoderKind
from coin.coding.decoder_config import REPLICA
from coin.commands.coded_system import Choice, CodedSystem, read_coded_system, read_every_result
from coin.commands.measure import measure_decoding, measure_service, measure_times
from coin.commands.parser import parse_options
from coin.core.processes import rank_zero_info
from coin.core.versions import versions
from coin.errors import ConfigurationError
from coin.files.atomic import atomic_path, write_text
from coin.networks import load_network
from coin.networks.compressed import compress
from coin.pipeline.options import config_dict
from coin.reporting.latency import print_simulation, tail_against
from coin.reporting.results import requested_policy, write_frame
from coin.reporting.style import as_png
from coin.reporting.summary import REFERENCES
from coin.reporting.tables import results_console
from coin.serving.model import NetworkServer
from coin.serving.replies import ReplyFormat
from coin.serving.sim.conditions import Conditions, ServiceKind
from coin.serving.sim.profile import Failover, Profile, Redundancy, StandIn
from coin.serving.sim.simulation import QueryTarget, Simulation, simulate_all

SIMULATION_CSV = "simulation.csv"
SEEDS = 20

Point = tuple[StandIn, Profile, Simulation]


def simulate(
    folder: str,
    conditions: Conditions,
    choice: Choice,
    wants: list[QueryTarget] | None = None,
    policies: list[Redundancy] | None = None,
    quantiles: list[float] | None = None,
    loads: list[float] | None = None,
    experts: list[int] | None = None,
    extras: list[int] | None = None,
    queries: int = 20_000,
    seeds: list[int] | None = None,
    failover: Failover | None = None,
    jobs: int | None = None,
    output: str | None = None,
) -> pd.DataFrame:
    """Simulate the latency and accuracy of answers, for every kind of stand-in for one of N experts.

    Args:
        folder: An experiment's folder, or a seed's.
        conditions: The machines and the front end to simulate.
        choice: Which coded systems; by default the most accurate one that uses survivors, and all that answer alone.
        wants: Whose answers a query wants: ``one`` expert's, drawn at random, or ``all`` experts'; by default both.
        policies: The kinds of stand-in; by default all whose accuracy is in the results.
        quantiles: The quantiles of own answers' time after which they count as late; by default 0.9.
        loads: The loads; by default 0.2, 0.4 and 0.6.
        experts: Numbers of experts; by default the experiment's. For others experts are repeated, and the accuracy of
            coded answers is unknown.
        extras: Numbers of extra servers; by default the number of the experiment's coded models.
        queries: Queries per seed.
        seeds: The seeds of everything random; by default 20.
        failover: A small network for all tasks, described by its options.
        jobs: The number of processes; by default one per processor core.
        output: The folder for ``simulation.csv``, ``simulation.json`` and the figures; by default `folder`.
    """
    loads, seeds = [0.2, 0.4, 0.6] if loads is None else loads, list(range(SEEDS)) if seeds is None else seeds
    quantiles = [0.9] if quantiles is None else quantiles
    lists = {"wants": wants, "policies": policies, "loads": loads, "quantiles": quantiles, "experts": experts}
    for name, given in (lists | {"extras": extras}).items():
        if given is not None and (not given or len(set(given)) < len(given)):
            raise ConfigurationError(f"found {name}={[*map(str, given)]}, expected one or more, no duplicates")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigurationError(f"found seeds {seeds}, expected distinct numbers from 0")
    system, profile, conditions, known = read_profile(folder, choice, conditions, failover)
    rank_zero_info(system.title)
    if missing := set(policies or ()) - {what.kind for what in known}:
        raise ConfigurationError(f"found no {(kind := min(missing))} in the results; {lacking(kind, folder, choice)}")
    points = [
        (what, sized, sized.simulation(what, conditions, quantile, load=load, want=want, queries=queries))
        for want in wants or QueryTarget
        for count in experts or [profile.code.num_experts]
        for load in loads
        for extra in extras or [profile.code.num_coded]
        for sized in [profile.resized(count, extra)]
        for what in (each if sized is profile else each.elsewhere for each in known)
        if what.kind in (policies or Redundancy)
        for quantile in (quantiles[:1] if what.kind is Redundancy.uncoded else quantiles)
    ]
    rows = simulate_rows(points, seeds, jobs)
    place = Path(output or folder)
    write_frame(place / SIMULATION_CSV, rows)
    options = {
        "method": system.method, "batchnorm": system.batchnorm, "decoder": system.decoder.name, "seeds": seeds,
        "conditions": conditions, "failover": failover, "code": profile.code.matrix.tolist(),
        "service_seconds": [float(each.mean()) for each in profile.seconds],
    }  # fmt: skip
    text = json.dumps({"options": config_dict(options), "versions": versions()}, indent=1) + "\n"
    write_text(place / "simulation.json", text)
    draw(place / "plots" / "simulation-memory.png", "memory_server", rows[rows["load"] == loads[len(loads) // 2]])
    for count in dict.fromkeys(rows["experts"]):
        draw(place / "plots" / f"simulation-load-{count}.png", "load", rows[rows["experts"] == count])
    return rows


_REPLICAS = "give the experiment replicas: [{bits: 3, base_bits: 8}], and run it again"
_DECODER = "add {} to the experiment's decoders, and run it again"
LACKING = {
    Redundancy.replica_delta: _REPLICAS,
    Redundancy.neighbours: _REPLICAS,
    Redundancy.standin: _DECODER.format("expert_head"),
    Redundancy.coded_proactive: _DECODER.format("feature_ridge"),
    Redundancy.coded_hedged: _DECODER.format("feature_ridge"),
    Redundancy.failover: "give --failover.accuracy, .mib, .seconds",
}
"""What to do where nothing is known of what may stand in."""


def lacking(kind: Redundancy, folder: str, choice: Choice) -> str:
    """Return why the results lack a kind of stand-in, and what to do, in the words of `coin serve`."""
    if kind is Redundancy.standin:
        try:
            read_coded_system(Path(folder), choice, alone=True)
        except ConfigurationError as error:
            return str(error)
    elif kind.is_coded and choice.decoder:
        return f"found decoder '{choice.decoder}', which reads no survivor; choose another one"
    return LACKING[kind]


def read_profile(
    folder: str, choice: Choice, conditions: Conditions, failover: Failover | None
) -> tuple[CodedSystem, Profile, Conditions, list[StandIn]]:
    """Return a coded system, its experts' profile, the conditions as measured, and the possible stand-ins.

    The coded system is the most accurate one that uses survivors, if there is one.
    """
    _, frame = read_every_result(Path(folder))
    chosen = _what_was_measured(frame, choice)
    coded = chosen[chosen["survivors"]] if chosen["survivors"].any() else chosen[~chosen["replica"]]
    taken = choice  # of which nothing was measured: reading it says so
    if not coded.empty:
        best = coded.sort_values("decoded_accuracy", kind="stable").to_dict("records")[-1]
        taken = Choice(best["method"], best["batchnorm"], best["decoder"])
    system = read_coded_system(Path(folder), taken)
    servers = [NetworkServer(path, system.experts.width, system.decoder) for path in system.experts.paths.values()]
    service, decoding = conditions.service, 0.0
    if service.kind is ServiceKind.measured:
        times, marginals = zip(*map(measure_service, servers), strict=True)
        widths = servers[0].feature_widths()
        expects = ReplyFormat(system.experts.width, None if widths is None else sum(widths))
        decoding = measure_decoding(system.code, system.decoder, expects, widths)
        if service.marginal is None:
            conditions = replace(conditions, service=replace(service, marginal=float(np.mean(marginals))))
    else:
        times = (np.array([service.seconds]),) * len(servers)
    sizes = tuple(network_bytes(path) for path in system.experts.paths.values())
    profile = Profile(system.code, times, sizes, float(system.results["expert_accuracy"].mean()), decoding)
    every = _what_was_measured(frame, Choice())
    known = _stand_ins(system, profile, pd.concat([chosen[~chosen["replica"]], every[every["replica"]]]))
    if failover is not None:
        size, right, worst = failover.mib * 2**20, {1: failover.accuracy}, failover.accuracy / profile.accuracy
        known.append(StandIn(Redundancy.failover, "", size, 0.0, right, worst, seconds=failover.seconds))
    return system, profile, conditions, known


def _what_was_measured(frame: pd.DataFrame, choice: Choice) -> pd.DataFrame:
    """Return accuracy and memory of every chosen coded system with one expert lost, sorted by memory.

    ``worst`` is the smallest NDA over tasks, each a mean over seeds.
    """
    policy = None if choice.batchnorm is None else requested_policy(choice.batchnorm)
    for column, wanted in (("decoder", choice.decoder), ("method", choice.method), ("batchnorm", policy)):
        frame = frame if wanted is None else frame[frame[column] == wanted]
    one = frame[~frame["erased"].str.contains("+", regex=False) & ~frame["method"].isin(REFERENCES)]
    keys, numbers = ["method", "batchnorm", "decoder"], ["decoded_accuracy", "memory_mib"]
    worst = one.groupby([*keys, "task"])["nda"].mean().groupby(keys).min().rename("worst")
    means = one.groupby(keys, sort=False)[numbers].mean().join(worst).reset_index()
    means = means.sort_values(["memory_mib", "decoded_accuracy"], ascending=[True, False], kind="stable")
    own = [name == REPLICA or DecoderConfig.named(name).reads_survivors for name in means["decoder"]]
    replica = means["decoder"] == REPLICA
    return means.assign(replica=replica, survivors=np.array(own, dtype=bool) & ~replica)


def _stand_ins(system: CodedSystem, profile: Profile, measured: pd.DataFrame) -> list[StandIn]:
    """Return the possible stand-ins; of coded models that answer alone only those that no other dominates."""
    size, right = float(np.mean(profile.sizes)), {1: profile.accuracy}
    found = [
        StandIn(Redundancy.uncoded),
        StandIn(Redundancy.copy, "", size, 0.0, right, 1.0),
        StandIn(Redundancy.replica, "", 0.0, size, right, 1.0),
    ]
    best, of_system = 0.0, (system.method, system.batchnorm, system.decoder.name)
    for row in measured.to_dict("records"):
        name, kept = str(row["method"]), 2**20 * float(row["memory_mib"])
        accuracy, worst = float(row["decoded_accuracy"]), float(row["worst"])
        if row["replica"]:
            found += _deltas(system, name.removeprefix(f"{REPLICA}-"), kept, accuracy, worst)
        elif not row["survivors"] and accuracy > best:
            best, every = accuracy, DecoderConfig.named(row["decoder"]).kind is not DecoderKind.expert_head
            each = kept / system.code.num_coded
            found.append(StandIn(Redundancy.standin, f"{name} {row['decoder']}", each, 0.0, {1: best}, worst, every))
        elif row["survivors"] and (name, row["batchnorm"], row["decoder"]) == of_system:
            each = float(np.mean([network_bytes(path) for path in system.coded]))  # regressions are the front end's
            for kind in (Redundancy.coded_proactive, Redundancy.coded_hedged):
                found.append(StandIn(kind, "", each, 0.0, system.decoded_accuracy, worst))
    return found


def _deltas(system: CodedSystem, name: str, kept: float, accuracy: float, worst: float) -> list[StandIn]:
    """Return the stand-ins by compressed deltas of the experts, on a server of their own and on the neighbours'."""
    bits, rank = re.search(r"(\d+)bit", name), re.search(r"rank(\d+)", name)
    paths = list(system.experts.paths.values())
    first, last = (load_network(path).network for path in (paths[0], paths[-1]))
    how = int(bits[1]) if bits else None, int(rank[1]) if rank else None
    # How many bytes it takes, and how long to unpack, does not depend on what the base is.
    packed = compress(first, last, bits=how[0], rank=how[1], base_bits=0 if "nobase" in name else 32)
    seconds, each = float(np.median(measure_times(packed.network, 5))), float(packed.nbytes)
    fixed, kinds = max(0.0, kept - each * len(paths)), (Redundancy.replica_delta, Redundancy.neighbours)
    return [StandIn(kind, name, fixed, each, {1: accuracy}, worst, unpacking=seconds) for kind in kinds]


def network_bytes(path: Path) -> int:
    """Return the bytes of a network's weights and buffers."""
    return sum(values.nbytes for values in load_network(path).network.state_dict().values())


def simulate_rows(points: Sequence[Point], seeds: Sequence[int], jobs: int | None) -> pd.DataFrame:
    """Return a row for each stand-in, over the seeds; equal simulations run once."""

    def key(it: Simulation) -> tuple[object, ...]:
        pace = it.unpacking, it.unpacked, it.decoding, *map(id, it.samples)
        return it.policy, it.layout, it.machines, it.load, it.want, *pace

    distinct = {key(point[2]): point[2] for point in points}
    rank_zero_info(f"simulating {len(distinct)} ways to stand in, {len(seeds)} times each")
    outcomes = simulate_all([replace(each, seed=seed) for each in distinct.values() for seed in seeds], jobs)
    found = {name: outcomes[place * len(seeds) : (place + 1) * len(seeds)] for place, name in enumerate(distinct)}
    return pd.DataFrame([profile.row(what, it, found[key(it)]) for what, profile, it in points])


def draw(path: Path, column: str, rows: pd.DataFrame) -> None:
    """Write the figure of the latencies against a column, as PNG."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(as_png(tail_against(column, rows)))


def main(arguments: Sequence[str]) -> None:
    """Simulate, and print the table."""
    options = parse_options("simulate", simulate, arguments, conditions=Conditions, choice=Choice)
    print_simulation(simulate(**options), results_console())
    print(f"table: {Path(options['output'] or options['folder']) / SIMULATION_CSV}")
