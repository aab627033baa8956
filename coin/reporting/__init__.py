"""Tables, figures and the HTML report from measured rows alone, without PyTorch; `wandb_*` sends them to W&B."""

from typing import TYPE_CHECKING

from coin.core.lazy import importing

if TYPE_CHECKING:
    from coin.reporting.extras import (
        Examples as Examples,
        read_examples as read_examples,
        read_layers as read_layers,
        write_examples as write_examples,
        write_layers as write_layers,
    )
    from coin.reporting.report import write_report as write_report
    from coin.reporting.results import (
        COLUMNS as COLUMNS,
        Row as Row,
        confusion_key as confusion_key,
        read_configuration as read_configuration,
        read_confusions as read_confusions,
        read_results as read_results,
        write_results as write_results,
    )
    from coin.reporting.summary import (
        read_summary as read_summary,
        stand_ins as stand_ins,
        summarise as summarise,
        write_summary as write_summary,
    )
    from coin.reporting.tables import nda_tables as nda_tables, print_summary as print_summary

__getattr__ = importing(__name__, __file__)
