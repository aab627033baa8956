"""The table of stand-ins, the figure and the HTML report from measured rows alone, without PyTorch."""

from coin.reporting.choice import choose as choose
from coin.reporting.report import write_report as write_report
from coin.reporting.results import read_results as read_results
from coin.reporting.standins import experts as experts, standins as standins
from coin.reporting.summary import read_run as read_run, summarise as summarise
from coin.reporting.tables import standin_table as standin_table
