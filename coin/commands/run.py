"""``coin run``: a whole experiment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml  # type: ignore[import-untyped]

from coin.commands.parser import add_json_argument, command_parser, parse
from coin.core.processes import is_rank_zero
from coin.pipeline.experiment import Experiment
from coin.pipeline.plan import plan
from coin.pipeline.pool import Launch, check_launch
from coin.pipeline.run import check_options, run_experiment, run_only
from coin.reporting.report import REPORT_HTML
from coin.reporting.results import as_json
from coin.reporting.summary import read_run
from coin.reporting.tables import print_standins

DRY_RUN = "Print the plan: every step, done or to do."


def main(arguments: Sequence[str]) -> None:
    """Run an experiment, and print its results."""
    experiment, options = read_experiment(arguments)
    if options["dry_run"]:
        print_plan(experiment, options["launch"], as_document=options["json"])
    elif options["only"] is not None:
        run_only(experiment, options["only"])
    else:
        summary = run_experiment(experiment, options["launch"], run_step)
        if is_rank_zero():
            print_results(experiment, summary, as_document=options["json"])


def run_step(file: Path, name: str) -> None:
    """Run one step of an experiment's file, and what it needs: what a job does."""
    experiment, _ = read_experiment(["-c", str(file)])
    run_only(experiment, name)


def print_results(experiment: Experiment, summary: pd.DataFrame, *, as_document: bool) -> None:
    """Print the table of an experiment, and the command that goes on from it."""
    page = experiment.folder / REPORT_HTML
    if as_document:
        print(as_json({"experiment": experiment.name, "report": page, "summary": summary}))
        return
    _, frame = read_run(experiment.folder)
    print_standins(frame)
    print(f"report: {page}")
    print(f"next: coin choose {experiment.folder} --accuracy=0.98 says what to keep")


def print_plan(experiment: Experiment, launch: Launch, *, as_document: bool = False) -> None:
    """Check what a run checks, and print every step: done or to do."""
    check_options(experiment)
    steps = plan(experiment)
    check_launch(launch, steps[0].step.store)
    rows: list[dict[str, Any]] = []
    for planned in steps:
        step = planned.step
        rows.append(
            {
                "step": planned.what,
                "name": step.folder.name,
                "state": "done" if step.is_done else "to do",
            }
        )
    to_do = sum(row["state"] == "to do" for row in rows)
    if as_document:
        print(as_json({"experiment": experiment.name, "to_do": to_do, "steps": rows}))
        return
    print(f"{experiment.name}: {to_do} of {len(rows)} steps to do")
    for row in rows:
        print(f"{row['state']:>5}  {row['step']}")


def read_experiment(arguments: Sequence[str]) -> tuple[Experiment, dict[str, Any]]:
    """Return the experiment that the arguments of ``coin run`` describe, and the options beside it."""
    parser = command_parser("run")
    parser.add_class_arguments(Experiment, skip={"config"})
    parser.add_class_arguments(Launch, "launch")
    only = "Run this step of the plan (a task: its expert) for every seed, and what it depends on; nothing else."
    parser.add_argument("--only", type=str | None, default=None, help=only)
    parser.add_argument("--dry-run", action="store_true", help=DRY_RUN)
    add_json_argument(parser)
    found = parse(parser, arguments)
    given = yaml.safe_load(parser.dump(found, skip_validation=True))
    options = parser.instantiate(found).as_dict()
    beside = {name: options.pop(name) for name in ("launch", "only", "json", "dry_run")}
    own = {name: value for name, value in given.items() if name in options}
    for task in own["tasks"].values():
        task.setdefault("init_args", {})["image_size"] = options["network"].image_size
    return Experiment(**options, config=own), beside
