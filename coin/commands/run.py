"""``coin run``: a whole experiment."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from coin.coding.decoder_config import REPLICA
from coin.commands.parser import add_json_argument, command_parser, parsed
from coin.core.processes import is_rank_zero
from coin.pipeline.experiment import Experiment
from coin.pipeline.plan import plan, union
from coin.pipeline.pool import Launch, check_launch
from coin.pipeline.run import check_options, outlook, run_experiment, run_only
from coin.reporting.choice import has_weak_experts, recommended
from coin.reporting.report import REPORT_HTML
from coin.reporting.results import as_json
from coin.reporting.summary import REFERENCES, stand_ins
from coin.reporting.tables import print_summary


def main(arguments: Sequence[str]) -> None:
    """Run an experiment, and print its results."""
    experiment, options = read_experiment(arguments)
    if options["dry_run"]:
        print_outlook(experiment.name, [experiment], options["launch"], as_document=options["json"])
        return
    if options["only"] is not None:
        run_only(experiment, options["only"])
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
        if serve := serve_command(experiment.folder, stand_ins(summary)):
            print(f"      {serve} answers queries")


def serve_command(folder: Path, kept: pd.DataFrame) -> str:
    """Return the command that serves what is recommended of `stand_ins`; nothing where it needs no server, or none is.

    Results without known memory recommend nothing.
    """
    if kept.empty:
        return ""
    row = recommended(kept)
    if has_weak_experts(row) or row["name"] == REFERENCES[0]:
        return ""
    words = ["coin", "serve", str(folder), f"--method={row['name'].partition('[')[0]}"]
    words += [] if row["decoder"] == REPLICA else [f"--decoder={row['decoder']}"]
    return shlex.join(words)


def print_outlook(name: str, experiments: Sequence[Experiment], launch: Launch, *, as_document: bool = False) -> None:
    """Check what a run checks, and print every step: whether it has to run, why, where, and what its like took."""
    for experiment in experiments:
        check_options(experiment)
    steps = union(map(plan, experiments))
    check_launch(launch, steps[0].step.store)
    rows: list[dict[str, Any]] = [
        {
            "step": planned.what,
            "name": planned.step.folder.name,
            "state": "done" if not why else "to do",
            "seconds": seconds,
            "elsewhere": bool(why) and launch.side_by_side and planned.step.remote,
            "why": why,
            "made_by": planned.step.other_versions,
        }
        for planned, why, seconds in outlook(steps)
    ]
    waiting = [row for row in rows if row["why"]]
    if as_document:
        print(as_json({"experiment": name, "to_do": len(waiting), "steps": rows}))
        return
    took = sum(row["seconds"] or 0 for row in waiting)
    print(f"{name}: {len(waiting)} of {len(rows)} steps to do{f', which took {took:.0f} s last time' if took else ''}")
    width = max(len(row["step"]) for row in rows)
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f} s"
        place = " elsewhere" if row["elsewhere"] else ""
        made = f"by {row['made_by']}, not the versions of now" if row["made_by"] else ""
        print(f"{row['state']:>5}  {row['step']:{width}} {seconds:>7}  {row['why']}{made}{place}".rstrip())
    if launch.side_by_side:
        print(f"elsewhere: {launch.executor}, {launch.workers} at a time")


def read_experiment(arguments: Sequence[str]) -> tuple[Experiment, dict[str, Any]]:
    """Return the experiment that the arguments of ``coin run`` describe, and the options beside it."""
    parser = command_parser("run")
    parser.add_class_arguments(Experiment, skip={"given"})
    parser.add_class_arguments(Launch, "launch")
    only = "Run this step of the plan (a task: its expert) for every seed, and what it depends on; nothing else."
    parser.add_argument("--only", type=str | None, default=None, help=only)
    dry_run = "Print the plan: every step, whether it is done or to do and why, what it took last time."
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    add_json_argument(parser)
    given: dict[str, Any] = {}
    options = parsed(parser, arguments, given)
    beside = {name: options.pop(name) for name in ("launch", "only", "json", "dry_run")}
    own = {name: value for name, value in given.items() if name in options}
    for task in own["tasks"].values():
        task.setdefault("init_args", {})["image_size"] = options["network"].image_size
    return Experiment(**options, given=own), beside
