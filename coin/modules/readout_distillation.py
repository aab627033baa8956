"""Distillation with a linear readout of every expert, and `distill` for networks in memory."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from coin.coding import Code
from coin.core.batches import Batch, Forward
from coin.errors import ConfigurationError
from coin.merging import merge_networks
from coin.modules.distillation import Distillation
from coin.modules.shared import plot_against_epochs, tasks_of
from coin.networks import check_head, features_and_logits, head_name
from coin.networks.stages import full_precision


class ReadoutDistillation(Distillation):
    """Distillation with an additional loss: every expert's own output must be linear in the features.

    The decoder `feature_ridge` needs from the coded network, on samples of task j, features φ from which f_j can be
    read linearly; it needs Σ_i β_i f_i only as far as the linear decoder does. So the loss is

        ½ E‖f_θ(x) − Σ_i β_i f_i(x)‖² + w · ½ E_j E_{x∈T_j}‖R_j φ_θ(x) − f_j(x)‖²

    with one affine readout R_j per task. It starts as expert j's head, is trained with the network, and is then
    discarded: the decoder fits its own. The loss uses each calibration sample's task, but no label. By default there is
    no search over options.

    Source: the loss is this project's. Readouts beside a distilled network: Romero et al., *FitNets* (ICLR 2015).

    Args:
        readout_weight: w, at least 0; 0 leaves a distillation of fixed learning rate and steps.
        **options: The others are those of `Distillation`.
    """

    name = "readout_distillation"

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
        self.save_hyperparameters({"readout_weight": readout_weight})

    def hold(self, teachers: nn.ModuleList | list[nn.Module], student: nn.Module) -> None:
        """Take the experts and the student, and copy the experts' heads as the first readouts."""
        super().hold(teachers, student)
        self.readouts = nn.ModuleList([self._readout(network) for network in teachers])

    def on_fit_start(self) -> None:
        """Note which task each training sample is from, and start."""
        super().on_fit_start()
        plot_against_epochs(self, ["train/readout_loss"])
        self._parts = tasks_of(self).training_calibration().part.to(self.device)

    def training_step(self, batch: tuple[Tensor, Batch], batch_idx: int) -> Tensor:
        """Return the coding loss plus the weighted readout loss of one batch of positions and inputs."""
        positions, inputs = batch
        outputs = self._training_outputs(positions, inputs)
        features, logits = features_and_logits(self.student, inputs)
        if batch_idx == 0:
            check_head(self.student, features.detach(), logits.detach())
        loss = self._coding_loss(logits, self.target(outputs), "train")
        parts = self._parts[positions]
        read = torch.stack([readout(features) for readout in self.readouts])
        own = torch.arange(len(parts), device=parts.device)
        errors = full_precision(read[parts, own]) - full_precision(outputs[parts, own])
        readout_loss = 0.5 * errors.square().sum(1).mean()
        self._log("train/readout_loss", readout_loss, len(own))
        return loss + self.hparams["readout_weight"] * readout_loss  # type: ignore[no-any-return]

    def _readout(self, network: nn.Module) -> nn.Linear:
        """Return a copy of a network's head."""
        name = head_name(network)
        head = network.get_submodule(name)
        if not isinstance(head, nn.Linear) or head.bias is None:
            raise ConfigurationError(
                f"method '{self.label}' needs a fully connected head with a bias, found {type(head).__name__} in "
                f"'{name}'; leave the method out for this network"
            )
        return deepcopy(head).requires_grad_(True)


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
    """
    method = (ReadoutDistillation if readout else Distillation)(**options)
    return merge_networks(method, networks, code, calibration=calibration, forward=forward)
