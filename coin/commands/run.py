"""``coin run``: a whole experiment."""

from lightning.pytorch.cli import LightningArgumentParser

from coin.commands.command import Call, Command, add_json_argument, console
from coin.experiment import Experiment
from coin.experiment.launch import Launch
from coin.experiment.run import make_experts, run_experiment
from coin.processes import is_first
from coin.reporting import as_json, print_summary
from coin.reporting.report import REPORT_HTML


def _add_arguments(parser: LightningArgumentParser) -> None:
    parser.add_class_arguments(Experiment)
    parser.add_class_arguments(Launch, "launch")
    parser.add_argument(
        "--only", type=str | None, default=None, help="Make this task's expert for every seed, and nothing else."
    )
    add_json_argument(parser)


def _execute(call: Call) -> None:
    options = dict(call.options)
    launch, only, machine = (options.pop(name) for name in ("launch", "only", "json"))
    experiment = Experiment(**options)
    if only is not None:
        make_experts(experiment, only)
        return
    summary = run_experiment(experiment, call.repeat_of, launch=launch)
    page = experiment.folder / REPORT_HTML
    if not is_first():
        return
    if machine:
        print(as_json({"experiment": experiment.name, "report": page, "summary": summary}))
    else:
        print_summary(summary, console())
        print(f"report: {page}")


RUN = Command("Run a whole experiment, resumably.", _add_arguments, _execute)
