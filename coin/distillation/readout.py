"""Distillation with a linear readout of every expert, and `distill` for networks in memory."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from coin.coding import Code
from coin.core.batches import Forward
from coin.distillation.method import Distillation
from coin.errors import ConfigurationError
from coin.merging import merge_networks
from coin.modules.distillation import ReadoutDistillationModule


class ReadoutDistillation(Distillation):
    """Distillation with an additional loss: every expert's own output must be linear in the features.

    The decoder `feature_ridge` needs, on samples of task j, features φ from which f_j can be read linearly. The loss is

        ½ E‖f_θ(x) − Σ_i β_i f_i(x)‖² + w · ½ E_j E_{x∈T_j}‖R_j φ_θ(x) − f_j(x)‖²

    with one readout R_j per task. It starts as expert j's head, is trained with the network, unless that head is a
    zero-shot one, and is then discarded: the decoder fits its own. The loss uses each calibration sample's task, but no
    label. By default there is no search over options.

    Source: the loss is this project's. Readouts beside a distilled network: Romero et al., *FitNets* (ICLR 2015).

    Args:
        readout_weight: w, at least 0; 0 leaves a distillation of fixed learning rate and steps.
        **options: The others are those of `Distillation`.

    >>> len(coin.merge_networks(coin.ReadoutDistillation(steps=1), experts, code, calibration=inputs))
    1
    """

    name = "readout_distillation"
    module_class = ReadoutDistillationModule

    def __init__(
        self,
        experts: list[str] | None = None,
        code_row: list[float] | None = None,
        lr: float | None = 1e-3,
        steps: int = 100,
        readout_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(experts, code_row, lr=lr, steps=steps, **options)
        if not 0 <= readout_weight < float("inf"):
            raise ConfigurationError(f"found readout_weight={readout_weight}, expected a number of at least 0")
        self.recorded_options["readout_weight"] = readout_weight


def distill(
    networks: Sequence[nn.Module],
    code: Code,
    calibration: Sequence[Iterable[Any]],
    *,
    readout: bool = False,
    forward: Forward | None = None,
    **options: Any,
) -> list[nn.Module]:
    """Distil N experts into coded models: R new networks in eval mode, one per row of the code, R×N.

    Args:
        networks: The experts.
        code: The code.
        calibration: For every expert the batches of its own task's samples, as for `merge_networks`.
        readout: Whether to use `ReadoutDistillation`.
        forward: How networks are called, as for `merge_networks`.
        **options: Those of `Distillation`, such as ``lr``, ``steps`` and ``seed``.

    Raises:
        ConfigurationError: An option is unknown or out of its range.
        NumericalError: The training diverges.

    >>> coin.distill(experts, code, inputs, lr=0.01, steps=1)
    [Linear(in_features=4, out_features=3, bias=True)]
    """
    method = (ReadoutDistillation if readout else Distillation)(**options)
    return merge_networks(method, networks, code, calibration=calibration, forward=forward)
