"""How a coded model is trained: like an expert, its learning rate and steps chosen on held-out calibration samples."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from coin.errors import CoinWarning, ConfigurationError, NumericalError
from coin.files.tensors import not_finite
from coin.merging import CodedModel, Experts
from coin.modules.recipe import Schedule

if TYPE_CHECKING:
    from coin.modules.distillation import Distillation

POINTS = 10
"""How often a run with a constant learning rate looks at the held-out samples: the numbers of steps to choose from."""

TRIALS = 12
"""The most trials of one search."""


class Training(ABC):
    """Trains the coded models of methods that are trained, on samples that a subclass has."""

    @abstractmethod
    def num_samples(self, method: "Distillation", experts: Any) -> int:
        """Return the number of pooled calibration samples, the held-out ones among them."""

    @abstractmethod
    def prepared(self, method: "Distillation", experts: Any, options: dict[str, Any]) -> "Distillation":
        """Return the module of one run: the method with other options, and its experts."""

    @abstractmethod
    def fit(self, module: "Distillation", held_out: float, options: dict[str, Any]) -> None:
        """Run a Trainer with these options over the samples without a share of them, which it validates on."""

    def __call__(self, method: "Distillation", experts: Experts, row: Sequence[float]) -> CodedModel:
        """Train the coded model of one row of the code, and count what all runs take.

        With its learning rate left open, the pair of learning rate and number of steps with the smallest loss on
        held-out samples is chosen: under a one-cycle schedule by `search_grid`, whose answer is at no edge; with a
        constant rate among the given ones and some ten points of their runs. The final run is on all samples.

        Raises:
            NumericalError: All runs diverge.
        """
        starts: dict[float, Any] = {}
        lr, steps = method.hparams["lr"], int(method.hparams["steps"])
        chosen: dict[str, Any] = {}

        def run(lr: float, steps: int, held_out: float, every: int = 0) -> "Distillation":
            module = self.prepared(method, experts, {"code_row": list(row), "lr": lr, "steps": steps})
            module.begun = starts.get(held_out)
            self.fit(module, held_out, _trainer_options(steps, held_out, every or steps))
            assert module.begun is not None
            starts[held_out] = module.begun
            experts.passes += module.passes
            return module

        if lr is None:
            share = method.hparams["held_out"]
            _check_held_out(self.num_samples(method, experts), share)
            rates = method.hparams["learning_rates"]
            if method.hparams["schedule"] == Schedule.one_cycle:

                def loss(rate: float, count: int) -> float:
                    losses = run(rate, count, share).losses
                    return losses[-1] if losses and math.isfinite(losses[-1]) else math.inf

                (lr, steps), tried, inside = search_grid(loss, rates, steps)
                if not inside:
                    warnings.warn(
                        f"method '{method.label}' chose lr={lr:.3g} and {steps} steps after {TRIALS} trials, at the "
                        "edge of what it tried; begin nearer with learning_rates and steps",
                        CoinWarning,
                        stacklevel=2,
                    )
            else:
                every = max(1, steps // POINTS)
                curves = {rate: run(rate, steps, share, every).losses for rate in rates}
                tried = {
                    (rate, (point + 1) * every): loss
                    for rate, losses in curves.items()
                    for point, loss in enumerate(losses)
                    if math.isfinite(loss)
                }
            if not any(map(math.isfinite, tried.values())):
                raise NumericalError(f"{method.label} diverged with every learning rate of {rates}; give smaller ones")
            lr, steps = min(tried, key=lambda pair: tried[pair])
            if method.hparams["schedule"] != Schedule.one_cycle:
                inside = rates[0] < lr < rates[-1]
            chosen = {
                "at_edge": not inside,
                "lr": lr,
                "steps": steps,
                "held_out_loss": {f"{rate:.3g} × {count}": loss for (rate, count), loss in tried.items()},
            }
        module = run(lr, steps, 0.0)
        if not_finite(dict(module.named_parameters())) is not None:
            raise NumericalError(f"{method.label} diverged with lr={lr}; give a smaller one")
        assert module.student is not None
        return CodedModel(module.student, chosen | module.chosen)


def _trainer_options(steps: int, held_out: float, every: int) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "max_epochs": -1,
        "log_every_n_steps": max(1, steps // POINTS),
        "num_sanity_val_steps": 0,
        "val_check_interval": every if held_out else None,
        "check_val_every_n_epoch": None if held_out else 1,
        "limit_val_batches": 1.0 if held_out else 0,
    }


def _check_held_out(samples: int, share: float) -> None:
    held_out = max(1, round(share * samples))
    if samples - held_out < 2:
        raise ConfigurationError(
            f"found {samples} pooled calibration samples for distillation, {held_out} of them held out to choose "
            "its learning rate on, expected at least 2 others to train on; raise samples_per_task or give it an lr"
        )


def search_grid(
    loss: Callable[[float, int], float], rates: Sequence[float], steps: int
) -> tuple[tuple[float, int], dict[tuple[float, int], float], bool]:
    """Walk a grid of learning rates and numbers of steps downhill, until all four neighbours are worse.

    The grid goes on beyond the given rates in their own ratio (√10 for a single one), and from `steps` in powers of
    two; so the answer is at no edge, unless the trials run out.

    Args:
        loss: The held-out loss of a pair; infinite where a run diverges.
        rates: Rising; the walk begins in their middle.
        steps: Where it begins.

    Returns:
        The best pair, the losses of all that were tried, and whether the best one's neighbours are all among them.
    """
    ratio = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1)) if len(rates) > 1 else math.sqrt(10)
    tried: dict[tuple[int, int], float] = {}

    def pair(place: tuple[int, int]) -> tuple[float, int]:
        index, power = place
        rate = rates[index] if 0 <= index < len(rates) else rates[0] * ratio**index
        return rate, max(1, round(steps * 2.0**power))

    def neighbours(place: tuple[int, int]) -> list[tuple[int, int]]:
        index, power = place
        around = [(index - 1, power), (index + 1, power), (index, power - 1), (index, power + 1)]
        return [each for each in around if pair(each) != pair(place)]

    best = (len(rates) // 2, 0)
    tried[best] = loss(*pair(best))
    while missing := [each for each in neighbours(best) if each not in tried]:
        if len(tried) == TRIALS:
            break
        tried[missing[0]] = loss(*pair(missing[0]))
        best = min(tried, key=lambda each: tried[each])
    return pair(best), {pair(place): value for place, value in tried.items()}, not missing
