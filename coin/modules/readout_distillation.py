"""The LightningModule of a distillation with a linear readout of every expert."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from coin.core.batches import Batch
from coin.core.lightning import plot_against_epochs
from coin.errors import ConfigurationError
from coin.modules.distillation import DistillationModule
from coin.networks import check_head, features_and_logits, head_name
from coin.networks.heads import is_frozen
from coin.networks.stages import full_precision


class ReadoutDistillationModule(DistillationModule):
    """Distillation with an additional loss, of linear readouts of every expert; see `coin.ReadoutDistillation`."""

    def hold(self, teachers: nn.ModuleList | list[nn.Module], student: nn.Module) -> None:
        """Take the experts and the student, and copy the experts' heads as the first readouts."""
        super().hold(teachers, student)
        self.readouts = nn.ModuleList([self._readout(network) for network in teachers])

    def on_fit_start(self) -> None:
        """Note which task each training sample is from, and start."""
        super().on_fit_start()
        plot_against_epochs(self, ["train/readout_loss"])
        assert self.samples is not None
        self._parts = self.samples.part.to(self.device)

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
        """Return a copy of a network's head, which is trained unless the network's own is not."""
        name = head_name(network)
        head = network.get_submodule(name)
        if not isinstance(head, nn.Linear):
            raise ConfigurationError(
                f"a readout needs a fully connected head, found {type(head).__name__} in '{name}'; leave "
                "ReadoutDistillation out for this network"
            )
        return deepcopy(head).requires_grad_(not is_frozen(network))
