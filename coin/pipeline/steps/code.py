"""The code of an experiment: given, ready-made, or chosen from calibration data before anything is merged."""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coin.coding import Code, choose_code, convex, simplex_codes, uniform
from coin.coding.ready import decoded_error_bound
from coin.core.processes import rank_zero_info
from coin.data import Calibration, TaskData
from coin.errors import ConfigurationError, NumericalError
from coin.files.atomic import write_text
from coin.merging import Average, Experts
from coin.networks.experts import ExpertFiles
from coin.pipeline.config import CalibrationConfig
from coin.pipeline.step import Step, keyed_by
from coin.pipeline.steps.samples import calibrations, samples_key
from coin.pipeline.steps.train import ExpertStep

AUTO = "auto"
"""The value of `code` that has every seed choose its own."""

SAMPLES = 50
"""The most calibration samples of each task that the choice looks at."""

_CANDIDATES = 39


@dataclass(frozen=True)
class SeedCode:
    """A code, and the cost of choosing it in wall time and forward-equivalents: 0 for a code that was given."""

    code: Code
    seconds: float = 0.0
    passes: float = 0.0


def read_code(option: Any, num_experts: int) -> Code | None:
    """Return the code for an experiment's option `code` and N experts; None for `AUTO`.

    Raises CoinError if the option is no code, is for another number of experts, or cannot decode every erasure of R.
    """
    if option == AUTO:
        return None
    if option is None:
        return uniform(num_experts)
    if isinstance(option, int) and not isinstance(option, bool):
        return convex(num_experts, option)
    if not isinstance(option, list):
        raise ConfigurationError(
            f"found code {option!r}, expected R rows of N weights, a number R of coded models, {AUTO}, or null"
        )
    code = Code(option)
    if code.num_experts != num_experts:
        raise ConfigurationError(f"found a code for {code.num_experts} experts, expected {num_experts}")
    return code


def candidate_codes(num_experts: int) -> list[Code]:
    """Return the codes to choose from: uniform weights first, then the finest even grid of at most 39 codes.

    39 codes are the multiples of 1/40 for two experts, and 36 the multiples of 1/10 for three.
    """
    resolution = num_experts
    while resolution < _CANDIDATES + 1 and math.comb(resolution, num_experts - 1) <= _CANDIDATES:
        resolution += 1
    first, grid = uniform(num_experts), simplex_codes(num_experts, resolution)
    return [first, *(each for each in grid if not torch.allclose(each.matrix, first.matrix, rtol=0, atol=1e-9))]


def choose_weights(
    networks: Sequence[nn.Module], calibrations: Iterable[Calibration]
) -> tuple[Code, list[dict[str, Any]], float]:
    """Choose one coded model's weights by the residual of the β-average on calibration data.

    The residual of a candidate β is the root mean square of f̄(β) − Σ_i β_i f_i over samples and logits, where f̄(β) is
    the β-average of the experts (`coin.merging.Average` with its BatchNorm policy); `coin.coding.choose_code`
    multiplies it by the code's worst noise amplification. At most `SAMPLES` samples of each task are used.

    Returns:
        The code, the scores of all candidates, and the forward-equivalents spent.
    """
    few = [each.subset(range(min(SAMPLES, each.num_samples))) for each in calibrations]
    experts = Experts(networks, calibration=few)
    method, residuals, table = Average(), {}, []
    candidates = candidate_codes(len(networks))
    for code in candidates:
        row = code.matrix[0].tolist()
        average = method.make(experts, row).network
        error = experts.run(average, experts.pooled).logits - experts.target(row)
        residuals[code] = float(error.double().square().mean().sqrt())
        if not math.isfinite(residuals[code]):
            raise NumericalError(
                f"the outputs of the experts or of their average with weights {row} on calibration data are not "
                "finite; check the experts, or give a code"
            )
        described = {"row": row, "residual": residuals[code], "amplification": code.worst_amplification()}
        table.append({**described, "score": decoded_error_bound(code, residuals[code])})
    return choose_code(candidates, residuals.__getitem__), table, experts.passes


@dataclass(frozen=True, eq=False, kw_only=True)
class ChooseCode(Step):
    """Chooses the code of a seed and writes it as JSON, with the candidates' scores; see `choose_weights`."""

    experts: dict[str, ExpertStep]
    tasks: dict[str, TaskData]
    calibration: CalibrationConfig = keyed_by(samples_key)

    @property
    def doing(self) -> str:
        """What it does."""
        return "choosing its weights"

    @property
    def output(self) -> Path:
        """The file that it writes."""
        return self.folder / "code.json"

    def run(self) -> None:
        """Choose the code, and write it."""
        started = time.perf_counter()
        networks = ExpertFiles({task: step.output for task, step in self.experts.items()}).networks
        code, table, passes = choose_weights(networks, calibrations(self.tasks, self.calibration))
        document = {"matrix": code.matrix.tolist(), "seconds": time.perf_counter() - started, "passes": passes}
        write_text(self.output, json.dumps({**document, "candidates": table}, indent=1))
        rank_zero_info(f"code: chosen weights {', '.join(f'{weight:.3g}' for weight in code.matrix[0].tolist())}")

    def read(self) -> SeedCode:
        """Return the code that was chosen."""
        document = json.loads(self.output.read_text(encoding="utf-8"))
        return SeedCode(Code(document["matrix"]), float(document["seconds"]), float(document["passes"]))
