"""The commands that need no model, no data and no Trainer from the command line, by name."""

from coin.commands.command import Call, Command
from coin.commands.dashboard import DASHBOARD
from coin.commands.merge import MERGE
from coin.commands.report import REPORT
from coin.commands.run import RUN
from coin.commands.serve import SERVE
from coin.commands.simulate import SIMULATE
from coin.commands.sweep import SWEEP

COMMANDS = {
    "run": RUN,
    "merge": MERGE,
    "sweep": SWEEP,
    "report": REPORT,
    "dashboard": DASHBOARD,
    "simulate": SIMULATE,
    "serve": SERVE,
}

__all__ = ["COMMANDS", "Call", "Command"]
