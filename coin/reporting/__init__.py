"""Tables, figures and the HTML report from measured rows alone, without PyTorch; `wandb_*` sends them to W&B."""

from typing import TYPE_CHECKING

from coin.core.lazy import importing

if TYPE_CHECKING:
    from coin.reporting.extras import Examples, read_examples, read_layers, write_examples, write_layers
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
    from coin.reporting.summary import read_summary, stand_ins, summarise, write_summary
    from coin.reporting.tables import nda_tables, print_summary

__all__ = [
    "COLUMNS",
    "Examples",
    "Row",
    "as_json",
    "confusion_key",
    "nda_tables",
    "print_summary",
    "read_configuration",
    "read_confusions",
    "read_examples",
    "read_layers",
    "read_results",
    "read_summary",
    "stand_ins",
    "summarise",
    "write_examples",
    "write_layers",
    "write_report",
    "write_results",
    "write_summary",
]

__getattr__ = importing(__name__, ["extras", "report", "results", "summary", "tables"])
