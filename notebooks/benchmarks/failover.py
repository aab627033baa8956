"""Kill and stop real servers under a steady load, and measure what each kind of one server more is worth.

    python notebooks/benchmarks/failover.py runs/quickstart-3 --output failover --repeats 3
    python notebooks/benchmarks/failover.py --fleet 27 --setups standin-packed --events 1 3 all --loads --slow 0

For every set-up `coin serve` is started, and a client asks for single test images by a Poisson process, at a share of
the capacity without a server more:

- *events*: after some seconds of load servers go down. ``1``, ``2``, ``all``: so many experts are killed (SIGKILL), at
  once, as on a machine that they share; ``machine``: an expert and the server that stands in, which share one;
  ``stopped``: an expert is stopped (SIGSTOP). They stay down for the rest of the phase. With each event comes one query
  for every task that has lost its expert. The objective is twice the median time of the answers before the event.
- *slow*: the first expert runs for a fifth of the time (SIGSTOP and SIGCONT in turns), at the load of the events.
- *loads*: several loads, with all experts and without the first. The objective is twice the median of the first load.
- *accuracy*: every test image is asked for once while 0, 1, … all experts are down; no answer is a wrong answer.

The memory of a server is what its process shares with no other, less that of a process of its kind without a network.

It writes ``events.csv``, ``loads.csv``, ``accuracy.csv`` and ``slow.csv``: medians over the repeats, the least and the
largest; and ``queries.csv``: every query of the events.

The first set-up that has a server more is also sent wrong queries and a crowd of clients. The exit status is 1 where

- an answer is not that of the servers which it names;
- in *accuracy*, where only two queries are open at a time, there is no answer though the servers that are left make up
  for the lost ones (under load, ``failed`` counts these);
- a status in the crowd is none of 200, 429, 503 and 504, or a wrong query's is no 4xx.
"""

import argparse
import asyncio
import math
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import yaml
from served import (
    Answered,
    Client,
    Known,
    Outage,
    Served,
    Slowdown,
    crowd,
    free_port,
    private_mib,
    wrong_queries,
)

from coin.commands.serve import read_system
from coin.core.ray_cluster import set_ray_variables, start_ray
from coin.reporting import read_results
from coin.serving.policies import PolicyKind
from coin.serving.system import System

SETUPS = ("uncoded", "replica", "copies", "standin-packed", "coded_hedged")
EVENTS = ("1", "2", "all", "machine", "stopped")
# So many queries in a row for lost experts' tasks that are answered in time: service has recovered.
IN_TIME = 10
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Setup:
    """A way to serve a run."""

    name: str
    folder: Path
    policy: PolicyKind
    method: str | None = None

    @property
    def options(self) -> list[str]:
        """The options of `coin serve`."""
        method = [f"--method={self.method}"] if self.method else []
        return [str(self.folder), f"--policy={self.policy}", *method]

    def system(self) -> System:
        """Return the system that `coin serve` serves with these options."""
        return read_system(str(self.folder), self.method, None, self.policy, 0.8)


def setup_named(name: str, folder: Path) -> Setup:
    """Return a set-up of a run; a stand-in is the one of least memory that reads no survivor."""
    results = read_results(folder / "seed-0")
    if name == "copies":
        methods = results.loc[results["decoder"] == "replica", "method"]
        return Setup(name, folder, PolicyKind.replica, str(methods.iloc[0]))
    if not name.startswith("standin"):
        return Setup(name, folder, PolicyKind(name))
    rows = results[results["decoder"] == "expert_head"].sort_values("memory_mib")
    return Setup(name, folder, PolicyKind.standin, str(rows["method"].iloc[0]))


def empty_server_mib(system: System) -> float:
    """Return the private memory of a server's process that holds no network; to be called in a process of its own."""
    set_ray_variables(None)
    from ray import serve

    from coin.serving.ray_app import ModelProcess

    start_ray(None)
    serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
    system = replace(system, files={"empty": []})
    empty = serve.deployment(ModelProcess).options(name="empty", ray_actor_options={"num_cpus": 0})
    serve.run(empty.bind(system, "empty", "cpu", 8), name="coin", route_prefix=None)
    found = math.nan
    for process in psutil.Process().children(recursive=True):
        if "ServeReplica:coin:empty" in " ".join(process.cmdline()):
            found = private_mib(process)
    serve.shutdown()
    return found


class Benchmark:
    """The measurements of one set-up, as rows; `problems` says what was not as it should be."""

    def __init__(
        self, setup: Setup, served: Served, known: Known, options: argparse.Namespace
    ) -> None:
        self.setup, self.served, self.known, self.options = setup, served, known, options
        self.processes = list(known.system.stand_ins.servers)
        self.experts = list(known.system.stand_ins.experts)
        self.stand_ins = [name for name in self.processes if name not in self.experts]
        self.events: list[dict[str, Any]] = []
        self.queries: list[dict[str, Any]] = []  # every query of the events
        self.loads: list[dict[str, Any]] = []
        self.accuracy: list[dict[str, Any]] = []
        self.slow: list[dict[str, Any]] = []
        self.problems: list[str] = []

    async def run(self, capacity: float) -> None:
        """Measure everything, as often as there are repeats."""
        options, served = self.options, self.served
        served.recover(self.processes, self.known)
        async with Client(served, self.known) as client:
            await client.capacity(2, options.warmup)  # the front end learns which answers are late
            for repeat in range(options.repeats):
                for event in options.events:
                    await self.measure_event(client, event, options.load * capacity, repeat)
                if options.slow:
                    await self.measure_slow(client, options.load * capacity, repeat)
                for number_lost in (0, 1) if options.loads else ():
                    await self.measure_loads(client, capacity, number_lost, repeat)
                if options.images:
                    await self.measure_accuracy(client, repeat)

    def servers_of(self, event: str, repeat: int) -> list[str]:
        """Return the servers that an event takes down; each repeat begins with another expert."""
        first = repeat % len(self.experts)
        turned = self.experts[first:] + self.experts[:first]
        if event == "machine":
            return [turned[0], *self.stand_ins]
        if event == "stopped":
            return turned[:1]
        return turned if event == "all" else turned[: int(event)]

    async def measure_event(self, client: Client, event: str, rate: float, repeat: int) -> None:
        """Take servers down under load, and add a row."""
        down = self.servers_of(event, repeat)
        places = [place for place, name in enumerate(self.experts) if name in down]
        seconds = self.options.before + self.options.after
        loading = asyncio.create_task(client.load(rate, seconds, seed=repeat))
        await asyncio.sleep(self.options.before)
        with Outage(self.served, down, is_stop=event == "stopped") as outage:
            at_once = [asyncio.create_task(client.ask(place, [0])) for place in places]
            answers = [*await loading, *await asyncio.gather(*at_once)]
            held = [private_mib(process) for process in self.served.named(self.stand_ins)]
            own = [private_mib(process) for process in self.served.named(self.experts)]
        self.check(answers, outage.began, f"event {event}")
        for answer in answers:
            about = {
                "setup": self.setup.name,
                "event": event,
                "repeat": repeat,
                "task": answer.place,
            }
            by = answer.parameters.get("answered_by", "")
            when = {"sent_s": answer.sent - outage.began, "ms": 1e3 * answer.seconds}
            self.queries.append(
                about | when | {"status": answer.status, "answered_by": by, "right": answer.right}
            )
        row = {"setup": self.setup.name, "event": event, "lost": len(places)}
        row |= event_row(answers, outage.began, places, self.options.after)
        row["stand_in_mib"] = sum(held) - self.options.empty_mib * len(held) if held else math.nan
        row["expert_mib"] = float(np.mean(own)) - self.options.empty_mib if own else math.nan
        self.events.append(row)
        told = {name: round(value, 3) for name, value in row.items() if isinstance(value, float)}
        print(f"{self.setup.name}, repeat {repeat}, event {event}: {told}", flush=True)
        self.served.recover(self.processes, self.known)

    async def measure_loads(
        self, client: Client, capacity: float, number_lost: int, repeat: int
    ) -> None:
        """Add a row for each load, with the first experts down."""
        down = self.servers_of(str(number_lost), repeat)
        objective = math.nan
        with Outage(self.served, down) as outage:
            await client.load(
                min(self.options.loads) * capacity, 2.0, seed=repeat
            )  # it is known who is lost
            for load in self.options.loads:
                answers = await client.load(load * capacity, self.options.after, seed=repeat)
                self.check(answers, outage.began, f"load {load}, {number_lost} lost")
                if math.isnan(objective):
                    objective = 2 * float(np.median([answer.seconds for answer in answers]))
                row = {
                    "setup": self.setup.name,
                    "load": load,
                    "lost": number_lost,
                    "rate": load * capacity,
                }
                self.loads.append(row | load_row(answers, objective, self.options.after))
        if down:
            self.served.recover(self.processes, self.known)

    async def measure_slow(self, client: Client, rate: float, repeat: int) -> None:
        """Slow the first expert down, and add a row of what is measured."""
        await client.load(rate, self.options.before, seed=repeat)
        with Slowdown(self.served, self.experts[0]) as slowdown:
            await client.load(rate, 2.0, seed=repeat)  # the front end learns what is late now
            answers = await client.load(rate, self.options.slow, seed=repeat)
        self.check(answers, slowdown.began, "one slow expert")
        row = {
            "setup": self.setup.name,
            "rate": rate,
            "failed": sum(answer.status != 200 for answer in answers),
        }
        seconds = [answer.seconds for answer in answers if answer.status == 200]
        for name, quantile in (("p50_ms", 0.5), ("p99_ms", 0.99)):
            row[name] = 1e3 * float(np.quantile(seconds, quantile, method="higher"))
        self.slow.append(row)
        print(f"{self.setup.name}, repeat {repeat}, one slow expert: {row}", flush=True)

    async def measure_accuracy(self, client: Client, repeat: int) -> None:
        """Ask for every image while no expert, one, … all experts are down, and add a row for each."""
        order = self.servers_of("all", repeat)
        with ExitStack() as outages:
            for number_lost in range(len(order) + 1):
                down = order[:number_lost]
                began = time.monotonic()
                if down:
                    outages.enter_context(Outage(self.served, down[-1:]))
                answers = await client.every_image()
                self.check(answers, began, f"{number_lost} lost")
                self.check_completeness(answers, down)
                asked = sum(len(answer.rows) for answer in answers)
                failed = sum(len(answer.rows) for answer in answers if answer.status != 200)
                right = sum(answer.right for answer in answers)
                row = {
                    "setup": self.setup.name,
                    "lost": number_lost,
                    "share": number_lost / len(order),
                }
                self.accuracy.append(row | {"accuracy": right / asked, "failed": failed / asked})
        self.served.recover(self.processes, self.known)

    def check(self, answers: Sequence[Answered], since: float, where: str) -> None:
        """Note answers that are not those of the servers which they name."""
        for answer in answers:
            self.known.check(answer)
            if answer.status == 200 and not answer.is_exact:
                by = answer.parameters["answered_by"]
                when = f"{self.setup.name}, {where}, after {answer.ended - since:.2f} s"
                self.problems.append(
                    f"{when}: task {answer.place}: an answer that is not that of {by}"
                )

    def check_completeness(self, answers: Sequence[Answered], down: Sequence[str]) -> None:
        """Note answers that are missing though the servers left make up for those that are down."""
        stand_ins = self.known.system.stand_ins
        left = [name for name in self.processes if name not in down]
        for answer in answers:
            is_answerable = self.experts[answer.place] in left or stand_ins.suffice(
                answer.place, left
            )
            if answer.status != 200 and is_answerable:
                where = (
                    f"{self.setup.name}, without {', '.join(down) or 'losses'}, task {answer.place}"
                )
                self.problems.append(f"{where}: status {answer.status}, expected an answer")


def event_row(
    answers: Sequence[Answered], began: float, places: Sequence[int], after: float
) -> dict[str, float]:
    """Return what an event did; the objective is twice the median time of what was answered before it.

    ``last_late_ms`` is the time to the end of the last query of any task that failed or was beyond the objective,
    which may be so by chance; ``recovered_ms`` that of the last one before some for the lost tasks in a row were in
    time, 0 if none was late.
    """
    median = float(np.median([answer.seconds for answer in answers if answer.ended < began]))
    objective = 2 * median
    before = [answer for answer in answers if answer.ended < began]
    since = [answer for answer in answers if answer.ended >= began]
    of_lost = sorted(
        (answer for answer in since if answer.place in places), key=lambda answer: answer.sent
    )
    right = [answer.ended for answer in of_lost if answer.sent >= began and answer.is_exact]
    late = [answer.ended for answer in since if answer.seconds > objective]
    recovered, in_time = began, 0
    for answer in of_lost:
        in_time = in_time + 1 if answer.seconds <= objective else 0
        if in_time == IN_TIME:
            break
        if in_time == 0:
            recovered = max(recovered, answer.ended)
    return {
        "objective_ms": 1e3 * objective,
        "late_before": float(np.mean([answer.seconds > objective for answer in before])),
        "first_right_ms": 1e3 * (min(right, default=math.inf) - began),
        "last_late_ms": 1e3 * (max(late, default=began) - began),
        "recovered_ms": 1e3 * (recovered - began) if in_time == IN_TIME else math.inf,
        "failed": float(sum(answer.status != 200 for answer in since)),
        "asked": float(len(since)),
        **load_row(since, objective, after),
    }


def load_row(answers: Sequence[Answered], objective: float, seconds: float) -> dict[str, float]:
    """Return goodput in answers a second within the objective, the share beyond it, and quantiles in ms."""
    times = [answer.seconds for answer in answers]
    in_time = sum(each <= objective for each in times)
    p50, p99 = np.quantile(times, [0.5, 0.99], method="higher")
    return {
        "goodput": in_time / seconds,
        "beyond": 1 - in_time / len(times),
        "p50_ms": 1e3 * float(p50),
        "p99_ms": 1e3 * float(p99),
    }


def summary(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> pd.DataFrame:
    """Return the medians over the repeats, and the least and the largest as columns ``_low`` and ``_high``."""
    groups = pd.DataFrame(rows).groupby(list(keys), sort=False)
    table = groups.median()
    for name in map(str, list(table)):
        table[f"{name}_low"] = groups[name].min()
        table[f"{name}_high"] = groups[name].max()
    return table.reset_index()


def write_tables(tables: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Write and print the tables of what has been measured so far."""
    keys = {
        "events": ["setup", "event"],
        "loads": ["setup", "lost", "load"],
        "accuracy": ["setup", "lost"],
    }
    keys["slow"] = ["setup"]
    for name, rows in tables.items():
        if rows:
            table = summary(rows, keys[name])
            table.to_csv(output / f"{name}.csv", index=False)
            medians = [column for column in table if not column.endswith(("_low", "_high"))]
            print(f"\n{name}\n{table[medians].to_string(index=False)}", flush=True)


def fleet(count: int, output: Path) -> Path:
    """Make a run of so many small tasks, five characters each, with EfficientNet-Lite0 at 64 pixels."""
    tasks = {}
    for place in range(count):
        first = 2 * place + 2 * place // len(LETTERS)  # no two tasks have the same five
        classes = "".join(LETTERS[(first + step) % len(LETTERS)] for step in range(5))
        tasks[f"task{place}"] = {
            "class_path": "Glyphs",
            "init_args": {"classes": classes, "train_per_class": 200, "test_per_class": 20},
        }
    adapters = {"adapters": {"rank": 16}, "compress": {"bits": 4}}
    experiment = {
        "name": f"fleet-{count}",
        "network": {
            "name": "timm/tf_efficientnet_lite0",
            "image_size": 64,
            "weights": "IMAGENET1K_LITE0",
        },
        "tasks": tasks,
        "expert": {"epochs": 2, "lr": 0.002, "batch_size": 64, "freeze_batchnorm": True},
        "calibration": {"samples_per_task": 100, "fisher_data": "own"},
        "methods": [{"class_path": "Refit", "init_args": adapters}],
        "decoders": ["expert_head"],
        "replicas": [{"bits": 3, "base_bits": 8}],
        "seeds": [0],
    }
    file = output / "fleet.yaml"
    file.write_text(yaml.safe_dump(experiment, sort_keys=False))
    subprocess.run(
        [sys.executable, "-m", "coin", "run", "-c", str(file), f"--output={output / 'runs'}"],
        check=True,
    )
    return output / "runs" / f"fleet-{count}"


async def measured_capacity(served: Served, known: Known, seconds: float) -> float:
    """Return how many answers a second eight clients get."""
    async with Client(served, known) as client:
        await client.capacity(8, 2.0)
        return await client.capacity(8, seconds)


def parsed() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="a run's folder")
    parser.add_argument(
        "--output", type=Path, default=Path("failover"), help="the folder of the CSV files"
    )
    parser.add_argument("--setups", nargs="+", default=SETUPS, choices=SETUPS)
    parser.add_argument(
        "--events", nargs="*", default=EVENTS, help="numbers of experts, all, machine, stopped"
    )
    parser.add_argument(
        "--loads",
        type=float,
        nargs="*",
        default=(0.2, 0.4, 0.6, 0.8),
        help="shares of the capacity",
    )
    parser.add_argument("--load", type=float, default=0.3, help="that of the events")
    parser.add_argument("--capacity", type=float, help="answers a second; by default measured")
    parser.add_argument(
        "--warmup", type=float, default=20.0, help="seconds of queries after the start of a set-up"
    )
    parser.add_argument(
        "--before", type=float, default=6.0, help="seconds of an event's phase before it"
    )
    parser.add_argument(
        "--after", type=float, default=8.0, help="seconds after it, and of each load"
    )
    parser.add_argument(
        "--slow", type=float, default=20.0, help="seconds with a slow expert; 0 leaves that out"
    )
    parser.add_argument(
        "--images", type=int, default=96, help="test images of each task; 0 leaves accuracy out"
    )
    parser.add_argument(
        "--clients", type=int, default=400, help="the crowd; 0 leaves it and wrong queries out"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--serve", nargs="*", default=(), help="further options of coin serve, ray.limits.timeout=1"
    )
    parser.add_argument("--fleet", type=int, help="make and take a run of so many small tasks")
    return parser.parse_args()


def main() -> int:
    """Measure every set-up, write the tables and print them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is stopped then
    options = parsed()
    options.output.mkdir(parents=True, exist_ok=True)
    folder = fleet(options.fleet, options.output) if options.fleet else options.folder
    setups = [setup_named(name, folder) for name in options.setups]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        options.empty_mib = pool.submit(empty_server_mib, setups[0].system()).result()
    print(f"a server without a network: {options.empty_mib:.0f} MiB", flush=True)
    tables: dict[str, list[dict[str, Any]]] = {
        "events": [],
        "loads": [],
        "accuracy": [],
        "slow": [],
    }
    queries: list[dict[str, Any]] = []
    problems: list[str] = []
    for setup in setups:
        known = Known(folder, setup.system(), options.images or 96)
        with Served([*setup.options, *(f"--{option}" for option in options.serve)]) as served:
            if options.capacity is None:
                options.capacity = asyncio.run(measured_capacity(served, known, options.before))
                print(
                    f"capacity with {setup.name}: {options.capacity:.1f} answers a second",
                    flush=True,
                )
            benchmark = Benchmark(setup, served, known, options)
            try:
                asyncio.run(benchmark.run(options.capacity))
            finally:  # what was measured stays, if servers do not come back
                tables["events"] += benchmark.events
                tables["loads"] += benchmark.loads
                tables["accuracy"] += benchmark.accuracy
                tables["slow"] += benchmark.slow
                write_tables(tables, options.output)
            problems += benchmark.problems
            if options.clients and benchmark.stand_ins:
                if not wrong_queries(served, known):
                    problems.append("a wrong query's status is no 4xx")
                if not asyncio.run(crowd(served, known, options.clients)):
                    problems.append("a status in the crowd is none of 200, 429, 503 and 504")
                options.clients = 0
        queries += benchmark.queries
        pd.DataFrame(queries).to_csv(options.output / "queries.csv", index=False)
    print("\n".join(problems[:20]))
    print(f"WRONG: {len(problems)} problems" if problems else "all as it should be")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
