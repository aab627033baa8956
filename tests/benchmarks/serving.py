"""A served system beside its simulation: one expert killed, another slow, and the same system when all is well.

    python tests/benchmarks/serving.py runs/quickstart-3 [--load L] [--queries N] [--pace SECONDS]

It starts ``coin serve`` (extra ``serve``) as a process of its own on this machine, asks it over HTTP on 127.0.0.1 at a
Poisson process's times, a fixed number of queries, and stops it. First all is well. Then the last expert is slow by a
factor all the time (a fault of ``coin serve``'s), and the first one's process is killed after a third of the queries;
Ray starts another one. The simulation has the very same arrival times and wanted experts. What it is told of the
served system is how long each server takes while nothing else is asked, over HTTP, and for how long the killed server
was gone. Servers keep a pace, most of which they sleep, so that four of them share two cores as though each had its
own. Batches are of one query, as in the simulation. Decoding takes no time in the simulation. It takes the way there
and back, which occupies no server, for a part of the service, and so has its servers too busy by as much: in trouble it
is the slower of the two.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from coin.serving.case import Case, Outcome, Want
from coin.serving.client import Client, TaskAnswer
from coin.serving.scenario import Scenario, Slowdown, poisson_arrivals
from coin.serving.simulation import simulate, wanted_experts
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from coin.commands.serve import read_tasks
from coin.commands.served import read_accuracies, read_served
from coin.errors import ServingError
from coin.reporting import read_results
from coin.serving.decodings import coded_layout
from coin.serving.policies import make_policy

OUTPUT = Path("runs/bench/serving.json")
QUANTILES = (0.5, 0.9, 0.99)
TIMEOUT, COOLDOWN = 2.0, 1.0
"""Seconds: the front end's defaults."""
REPEATS = 20


@dataclass(frozen=True)
class Troubled(Scenario):
    """Servers of which one is slow all the time, and one is down once."""

    slow_server: int | None = None
    down_server: int | None = None
    down: tuple[float, float] = (0.0, 0.0)

    def slow_phases(self, server: int, seed: int) -> Iterator[float]:
        yield from (0.0, np.inf) if server == self.slow_server else ()

    def down_phases(self, server: int, seed: int) -> Iterator[float]:
        yield from self.down if server == self.down_server else ()


@dataclass(frozen=True)
class Measured:
    """What became of a series of queries, without the first twentieth."""

    latencies: NDArray[np.float64]
    wanted: NDArray[np.int64]
    decoded: NDArray[np.bool_]
    right: NDArray[np.bool_]
    failed: int
    down: tuple[float, float]


@contextmanager
def served(folder: str, port: int, arguments: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Client]]:
    """Run ``coin serve`` until the block ends."""
    command = [sys.executable, "-m", "coin", "serve", folder, f"--ray.port={port}", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    client = Client(f"http://127.0.0.1:{port}", timeout=30)
    try:
        end = time.monotonic() + 600
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit("coin serve does not run; what it says is above")
            try:
                client.health()
                break
            except ServingError:
                time.sleep(1.0)
        yield process, client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def replica(ancestor: int, name: str) -> int:
    """Return the process of a server among the descendants of ``coin serve``."""
    parents, found = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            pid, parent = int(path.name), int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (path / "cmdline").read_text()
        except OSError:
            continue
        parents[pid] = parent
        if command.startswith("ray::") and f"coin:{name}" in command.replace("#", ":"):
            found.append(pid)
    for pid in found:
        above = pid
        while above in parents and above != ancestor:
            above = parents[above]
        if above == ancestor:
            return pid
    raise SystemExit(f"found no process of {name} below {ancestor}")


def idle_times(client: Client, tasks: list[str], images: list[NDArray[np.uint8]], count: int) -> tuple[NDArray, ...]:
    """Return the seconds that each expert takes while nothing else is asked, over HTTP ``[count]``."""
    times: list[list[float]] = [[] for _ in tasks]
    for number in range(-10, count):
        for task, own, seconds in zip(tasks, images, times, strict=True):
            began = time.perf_counter()
            answer = client.ask(task, own[number])
            if number >= 0 and not answer.decoded:
                seconds.append(time.perf_counter() - began)
    return tuple(np.array(seconds) for seconds in times)


def load(
    client: Client,
    case: Case,
    tasks: list[str],
    images: list[NDArray[np.uint8]],
    labels: list[NDArray[np.int64]],
    kill: tuple[int, int, str] | None,
) -> Measured:
    """Ask a served system what a simulated case asks, at the same times.

    Args:
        client: Asks.
        case: The case: its arrival times and the experts that they want.
        tasks: The tasks' names.
        images: Each task's test images.
        labels: And their classes.
        kill: After how many queries the process of a server is killed: the number, ``coin serve``'s process, the name.
    """
    arrivals = poisson_arrivals(case.rate, case.queries, case.seed)
    wanted = [mask.bit_length() - 1 for mask in wanted_experts(case)]
    places = np.random.default_rng(case.seed).integers(0, 2**31, case.queries)
    latencies = np.full(case.queries, np.inf)
    decoded, right = np.zeros(case.queries, bool), np.zeros(case.queries, bool)
    down = [0.0, 0.0]

    def ask(number: int, due: float) -> None:
        expert = wanted[number]
        place = places[number] % len(images[expert])
        try:
            answer: TaskAnswer = client.ask(tasks[expert], images[expert][place])
        except ServingError as error:
            print(f"query {number}: {error}", file=sys.stderr)
            return
        latencies[number] = time.perf_counter() - due  # since the query was due, so that nothing is left out
        decoded[number] = answer.decoded
        right[number] = answer.predictions[0].index == labels[expert][place]

    def watch(name: str, began: float) -> None:
        """Note when the front end has had an answer of the killed server again."""
        while client.health()["servers"][name]["up"]:
            time.sleep(0.2)
        while not client.health()["servers"][name]["up"]:
            time.sleep(0.2)
        down[1] = time.perf_counter() - began

    with ThreadPoolExecutor(128) as pool:
        began = time.perf_counter() + 0.5
        for number, arrival in enumerate(arrivals.tolist()):
            if kill is not None and number == kill[0]:
                os.kill(replica(kill[1], kill[2]), signal.SIGKILL)
                down[0] = time.perf_counter() - began
                threading.Thread(target=watch, args=(kill[2], began), daemon=True).start()
            due = began + arrival
            time.sleep(max(0.0, due - time.perf_counter()))
            pool.submit(ask, number, due)
    if kill is not None and not down[1]:
        down[1] = np.inf
    counted = slice(case.queries // 20, None)
    failed = int(np.isinf(latencies[counted]).sum())
    experts = np.array(wanted)[counted]
    return Measured(latencies[counted], experts, decoded[counted], right[counted], failed, (down[0], down[1]))


def summary(latencies: NDArray[np.float64], decoded: float, failed: int, accuracy: float) -> dict[str, float]:
    """Return what is compared."""
    names = [f"p{100 * level:g}" for level in QUANTILES]
    values = np.quantile(latencies, QUANTILES, method="higher").tolist()
    return {**dict(zip(names, values, strict=True)), "decoded": decoded, "failed": failed, "accuracy": accuracy}


def simulated(outcome: Outcome, expert: float, decoded: float) -> dict[str, float]:
    """Return what a simulation says of the same; failed queries count as wrong."""
    share, failed = sum(outcome.decoded.values()) / outcome.answers, outcome.failed / outcome.answers
    accuracy = (1 - share - failed) * expert + share * decoded
    return summary(outcome.latencies, share, outcome.failed, accuracy)


def table(title: str, served: dict[str, float], same: dict[str, float], others: list[dict[str, float]]) -> Table:
    """Return the comparison: served, simulated with the same arrivals, and the range over other seeds."""
    made = Table(title=title, title_justify="left")
    for heading in ("", "served", "simulated, same arrivals", f"{REPEATS} other seeds"):
        made.add_column(heading, justify="right")
    for name, value in served.items():
        scale, unit = (1e3, " ms") if name.startswith("p") else (1, "") if name == "failed" else (100, " %")
        around = [scale * other[name] for other in others]
        made.add_row(
            name,
            f"{scale * value:.1f}{unit}",
            f"{scale * same[name]:.1f}{unit}",
            f"{min(around):.1f} to {max(around):.1f}{unit}",
        )
    return made


def main() -> None:
    """Serve, ask, simulate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--method", default=None)
    parser.add_argument("--decoder", default="linear")
    parser.add_argument("--load", type=float, default=0.2)
    parser.add_argument("--queries", type=int, default=700)
    parser.add_argument("--pace", type=float, default=0.1, help="seconds that every server takes at least")
    parser.add_argument("--slow", type=float, default=2.0, help="factor of the slow expert")
    parser.add_argument("--idle", type=int, default=60, help="queries to each expert that service times are taken from")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--only", choices=("well", "troubled"), default=None)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()

    system = read_served(Path(options.folder), options.method, None, options.decoder)
    accuracies = read_accuracies([system.folder], system.method, system.batchnorm, options.decoder)
    results = read_results(system.folder)
    chosen = (results.method == system.method) & (results.batchnorm == system.batchnorm)
    results = results[chosen & (results.decoder == options.decoder)].set_index("task")
    tasks, layout = list(system.tasks), coded_layout(system.code)
    images, labels = [], []
    for task in read_tasks(system).tasks.values():
        batches = list(task.test_dataloader())
        images.append(np.concatenate([batch[0].numpy() for batch in batches]))
        labels.append(np.concatenate([batch[1].numpy() for batch in batches]))
    arguments = [
        f"--method={system.method}", f"--batchnorm={system.batchnorm}", f"--decoder={options.decoder}",
        "--policy=coded_hedged", "--ray.limits.batch=1", f"--ray.limits.timeout={TIMEOUT}",
        f"--ray.limits.cooldown={COOLDOWN}", f"--ray.faults.pace={options.pace}",
        f"--ray.limits.initial_lateness={3 * options.pace}",
    ]  # fmt: skip
    names = [f"expert-{task}" for task in tasks]
    slow = len(tasks) - 1
    samples: tuple[NDArray[np.float64], ...] = ()
    found = {}
    for state in ("well", "troubled") if options.only is None else (options.only,):
        troubled = state == "troubled"
        faults = [f"--ray.faults.slow={{{names[slow]}: {options.slow}}}"] if troubled else []
        with served(options.folder, options.port, [*arguments, *faults]) as (process, client):
            if not samples:
                # Not the slow one, if there is: its queries are late, and keep the others busy.
                asked = tasks[:slow] if troubled else tasks
                samples = idle_times(client, asked, images[: len(asked)], options.idle)
                samples = (*samples, *(samples[0] for _ in range(len(tasks) - len(asked))))
            mean = float(np.mean([each.mean() for each in samples]))
            every = (*samples, *(samples[0] for _ in range(layout.num_coded)))
            # The pace is slowed, the way there and back is not.
            slowdown = Slowdown(factor=(mean + (options.slow - 1) * options.pace) / mean)
            scenario = Troubled(every, slowdown=slowdown, mean=mean)
            case = Case(
                layout, make_policy("coded_hedged"), scenario, options.load, Want.one, options.queries,
                deadline=10.0 / mean, cooldown=COOLDOWN / mean,
            )  # fmt: skip
            kill = (options.queries // 3, process.pid, names[0]) if troubled else None
            measured = load(client, case, tasks, images, labels, kill)
            health = client.health()
        if troubled:
            gone = replace(scenario.failures, detection=TIMEOUT / mean)
            scenario = replace(scenario, slow_server=slow, down_server=0, down=measured.down, failures=gone)
            case = replace(case, scenario=scenario)
        expert, decoded = accuracies.expert, accuracies.decoded[1]
        real = summary(measured.latencies, measured.decoded.mean(), measured.failed, measured.right.mean())
        same = simulated(simulate(case), expert, decoded)
        others = [simulated(simulate(replace(case, seed=seed)), expert, decoded) for seed in range(1, REPEATS + 1)]
        title = f"{state}: {case.rate:.1f} queries/s, {len(measured.latencies)} counted, service {1e3 * mean:.0f} ms"
        Console().print(table(title, real, same, others))
        for name, column, chosen in (
            ("own", "expert_accuracy", ~measured.decoded & np.isfinite(measured.latencies)),
            ("decoded", "decoded_accuracy", measured.decoded),
        ):
            if chosen.any():  # each answer is as likely to be right as its own task's are in the results
                likely = results.loc[[tasks[expert] for expert in measured.wanted[chosen]], column].to_numpy()
                spread = np.sqrt((likely * (1 - likely)).sum()) / len(likely)
                print(
                    f"{len(likely)} {name} answers, right: {100 * measured.right[chosen].mean():.1f} % served, "
                    f"{100 * likely.mean():.1f} ± {100 * spread:.1f} % by the results of these tasks"
                )
        if troubled:
            killed, back = measured.down
            print(f"{names[0]} was killed {killed:.1f} s after the start, and answered again at {back:.1f} s")
        print(f"the front end says {json.dumps(health['queries'])}")
        found[state] = {
            "served": real, "same": same, "others": others, "down": measured.down, "health": health,
            "service_times": [each.tolist() for each in samples],
        }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    written = {"options": {**vars(options), "output": None}, "accuracies": asdict(accuracies), "found": found}
    options.output.write_text(json.dumps(written, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
