"""Lightning's Trainer with the commands ``fisher`` and ``evaluate``, and what an evaluation leaves behind."""

from coin.trainer.trainer import (
    Trainer as Trainer,
    estimate_over_tasks as estimate_over_tasks,
    make_trainer as make_trainer,
)
