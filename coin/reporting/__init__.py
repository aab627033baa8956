"""Tables, figures and the HTML report from measured rows alone, without PyTorch."""

from coin.reporting.choice import choose as choose
from coin.reporting.report import write_report as write_report
from coin.reporting.results import read_confusions as read_confusions, read_results as read_results
from coin.reporting.summary import (
    read_summary as read_summary,
    stand_ins as stand_ins,
    summarise as summarise,
)
from coin.reporting.tables import nda_tables as nda_tables
