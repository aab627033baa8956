"""``coin run``: a whole experiment."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from coin.commands.parser import add_json_argument, command_parser, parsed
from coin.core.processes import is_rank_zero
from coin.pipeline import Experiment
from coin.pipeline.executors import check_launch
from coin.pipeline.launch import Launch
from coin.pipeline.run import downloads, planned, run_experiment, run_step
from coin.reporting.report_parts import REPORT_HTML
from coin.reporting.results import as_json
from coin.reporting.tables import print_summary, results_console, rich_table, seconds


def main(arguments: Sequence[str]) -> None:
    """Run an experiment, and print its results."""
    experiment, options = _read(arguments)
    if options["dry_run"]:
        _print_plan(experiment, options["launch"], options["json"])
        check_launch(options["launch"], experiment.layout.submitit)
        return
    if options["only"] is not None:
        run_step(experiment, options["only"])
        return
    summary = run_experiment(experiment, options["launch"])
    page = experiment.folder / REPORT_HTML
    if not is_rank_zero():
        return
    if options["json"]:
        print(as_json({"experiment": experiment.name, "report": page, "summary": summary}))
    else:
        print_summary(summary)
        print(f"report: {page}")
        print(f"next: coin choose {experiment.folder} --accuracy=0.98 says what to keep")
        print(f"      coin serve {experiment.folder} answers queries")


def experiment_of(arguments: Sequence[str]) -> Experiment:
    """Return the experiment that the arguments of ``coin run`` describe."""
    return _read(arguments)[0]


def _print_plan(experiment: Experiment, launch: Launch, machine: bool) -> None:
    """Print every step, whether it has to run, why and where, and how long its last run took."""
    rows = pd.DataFrame(
        [
            {
                "of": step.of_seed, "step": step.what, "name": step.name, "why": status.why, "seconds": status.seconds,
                "elsewhere": launch.side_by_side and step.elsewhere,
            }
            for step, status in planned(experiment)
        ]
    )  # fmt: skip
    waiting, wanted = rows["why"] != "", [asdict(each) for each in downloads(experiment) if not each.there]
    where = str(launch) if launch.side_by_side else None
    if machine:
        described = {"to_do": int(waiting.sum()), "steps": rows, "downloads": wanted, "elsewhere": where}
        print(as_json({"experiment": experiment.name, **described}))
        return
    shown = pd.DataFrame(
        {
            "step": rows["of"] + rows["name"],
            "state": waiting.map({True: "to do", False: "up to date"})
            + (waiting & rows["elsewhere"]).map({True: " elsewhere", False: ""}),
            "why": rows["why"],
            "last time, s": rows["seconds"].astype(float).map(seconds),
        }
    )
    if wanted:
        known = sum(each["mib"] or 0 for each in wanted if each["host"])
        unknown = " at least" if any(each["mib"] is None for each in wanted) else ""
        title = f"to download:{unknown} {known:,.0f} MiB"
        table = pd.DataFrame(
            {
                "what": [each["what"] for each in wanted],
                "MiB": ["?" if each["mib"] is None else f"{each['mib']:,.0f}" for each in wanted],
                "from": [each["host"] or f"by hand: {each['advice']}" for each in wanted],
            }
        )
        results_console().print(rich_table(table, title, texts=("what", "from")))
    title = f"{experiment.name}: {waiting.sum()} of {len(rows)} steps to do"
    results_console().print(rich_table(shown, title, texts=("step", "state", "why")))
    if where is not None:
        print(f"elsewhere: {where}")


def _read(arguments: Sequence[str]) -> tuple[Experiment, dict[str, Any]]:
    """Return the experiment, and the options beside it."""
    parser = command_parser("run")
    parser.add_class_arguments(Experiment)
    parser.add_class_arguments(Launch, "launch")
    parser.add_argument(
        "--only",
        type=str | None,
        default=None,
        help="Run this step of the plan (a task: its expert) for every seed, and what it depends on; nothing else.",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Print the plan: every step, whether it is up to date or to do and why, what it took last time.",
    )
    add_json_argument(parser)
    options = parsed(parser, arguments)
    beside = {name: options.pop(name) for name in ("launch", "only", "json", "dry_run")}
    return Experiment(**options), beside
