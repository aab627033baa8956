"""Tables, plots, the HTML report and what goes to W&B, from measured rows alone."""

from coin.reporting.extras import Examples, read_examples, read_layers, write_examples, write_layers
from coin.reporting.findings import Finding, findings
from coin.reporting.report import write_report
from coin.reporting.results import (
    COLUMNS,
    Row,
    as_json,
    confusion_key,
    read_configuration,
    read_confusions,
    read_results,
    write_results,
)
from coin.reporting.simulation import SimulationRow, print_simulation, read_simulation, write_simulation
from coin.reporting.summary import read_seeds, read_summary, summarise, write_summary
from coin.reporting.table import print_summary
from coin.reporting.wandb_connection import check_connection
from coin.reporting.wandb_evaluation import code_axes, log_evaluation, log_examples, log_method_runs, log_summary
from coin.reporting.wandb_logging import finish_run, log_artifact, start_run, training_loggers, use_artifact
from coin.reporting.wandb_settings import run_environment

__all__ = [
    "COLUMNS",
    "Examples",
    "Finding",
    "Row",
    "SimulationRow",
    "as_json",
    "check_connection",
    "code_axes",
    "confusion_key",
    "findings",
    "finish_run",
    "log_artifact",
    "log_evaluation",
    "log_examples",
    "log_method_runs",
    "log_summary",
    "print_simulation",
    "print_summary",
    "read_configuration",
    "read_confusions",
    "read_examples",
    "read_layers",
    "read_results",
    "read_seeds",
    "read_simulation",
    "read_summary",
    "run_environment",
    "start_run",
    "summarise",
    "training_loggers",
    "use_artifact",
    "write_examples",
    "write_layers",
    "write_report",
    "write_results",
    "write_simulation",
    "write_summary",
]
