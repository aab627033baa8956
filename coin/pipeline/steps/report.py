"""The step that draws the tables and figures of evaluations."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from coin.files.atomic import link, write_text
from coin.pipeline.step import Step
from coin.pipeline.steps.evaluation import Evaluate
from coin.reporting import write_report
from coin.reporting.summary import SEEDS_JSON, write_summary


@dataclass(frozen=True, eq=False, kw_only=True)
class Report(Step):
    """Writes the summary and the page of the evaluations of one or several seeds.

    Its folder is that of an experiment: the evaluations are linked there as ``seed-K``.
    """

    remote: ClassVar[bool] = False
    doing: ClassVar[str] = "drawing"

    evaluations: dict[int, Evaluate]  # by seed

    @property
    def shown(self) -> list[Path]:
        """What a person sees of its folder: what it writes."""
        return [path for path in super().shown if not path.is_symlink()]

    def run(self) -> None:
        """Write the files."""
        for seed, evaluation in self.evaluations.items():
            link(self.folder / f"seed-{seed}", evaluation.folder)
        write_text(self.folder / SEEDS_JSON, json.dumps({"seeds": list(self.evaluations)}))
        write_summary(self.folder)
        write_report(self.folder)
