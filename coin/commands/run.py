"""``coin run``: a whole experiment."""

from collections.abc import Sequence

from coin.commands.parser import add_json_argument, command_parser, parsed
from coin.core.processes import is_rank_zero
from coin.pipeline import Experiment
from coin.pipeline.executors import Launch
from coin.pipeline.run import run_experiment, run_step
from coin.reporting.report import REPORT_HTML
from coin.reporting.results import as_json
from coin.reporting.tables import print_summary


def main(arguments: Sequence[str]) -> None:
    """Run an experiment, and print its results."""
    experiment, launch, only, machine = _read(arguments)
    if only is not None:
        run_step(experiment, only)
        return
    summary = run_experiment(experiment, launch)
    page = experiment.folder / REPORT_HTML
    if not is_rank_zero():
        return
    if machine:
        print(as_json({"experiment": experiment.name, "report": page, "summary": summary}))
    else:
        print_summary(summary)
        print(f"report: {page}")


def experiment_of(arguments: Sequence[str]) -> Experiment:
    """Return the experiment that the arguments of ``coin run`` describe."""
    return _read(arguments)[0]


def _read(arguments: Sequence[str]) -> tuple[Experiment, Launch, str | None, bool]:
    parser = command_parser("run")
    parser.add_class_arguments(Experiment)
    parser.add_class_arguments(Launch, "launch")
    parser.add_argument(
        "--only",
        type=str | None,
        default=None,
        help="Run this step of the plan (a task: its expert) for every seed, and what it depends on; nothing else.",
    )
    add_json_argument(parser)
    options = parsed(parser, arguments)
    launch, only, machine = (options.pop(name) for name in ("launch", "only", "json"))
    return Experiment(**options), launch, only, machine
