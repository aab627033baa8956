"""Distillation for decoders that read features: the lost answers must be readable from the coded network's features."""

from copy import deepcopy

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from coin.data import Augmentation, Calibration
from coin.errors import ConfigurationError
from coin.merging import FeatureMap, HeadFit, MergeInputs
from coin.merging.networks import parameters_of
from coin.modules.axes import plot_against_epochs
from coin.modules.distillation import Distillation
from coin.networks import features_and_logits, fill_network, full_precision, head_name


class ReadoutDistillation(Distillation):
    """Distillation that also asks for features from which every expert's own answer can be read.

    The decoder `feature_ridge` needs from the coded network, on samples of task j, features φ from which f_j can be
    read linearly; it needs Σ_i β_i f_i only as far as the linear decoder does. So the loss is

        ½ E‖f_θ(x) − Σ_i β_i f_i(x)‖² + w · ½ E_j E_{x∈T_j}‖R_j φ_θ(x) − f_j(x)‖²

    with one affine readout R_j a task, which starts as expert j's head, is trained along, and is thrown away: the
    decoder fits its own. It is told which task a calibration sample is from, and no label.

    It starts from the β-average with its head fitted to Σβ_if_i (`coin.merging.HeadFit`), trains on augmented views,
    and ends after few steps of Adam under a one-cycle schedule: nothing is chosen per run.

    Source: the loss is this project's. Readouts beside a distilled network: Romero et al., *FitNets* (ICLR 2015); the
    schedule: Smith and Topin, *Super-convergence* (2018).

    All options but `readout_weight` are those of `Distillation`, with other defaults; `lr` is the schedule's largest.
    Those that choose an `lr` are missing.

    Args:
        readout_weight: w, at least 0; 0 leaves an augmented distillation from the fitted head.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    name = "readout_distillation"

    def __init__(
        self,
        experts: list[str] | None = None,
        code_row: list[float] | None = None,
        lr: float = 1e-3,
        steps: int = 100,
        batch_size: int = 64,
        readout_weight: float = 1.0,
        samples_per_task: int | None = None,
        augmentation: Augmentation = Augmentation.shift,
        label: str | None = None,
    ) -> None:
        super().__init__(
            experts=experts,
            code_row=code_row,
            lr=lr,
            steps=steps,
            batch_size=batch_size,
            samples_per_task=samples_per_task,
            augmentation=augmentation,
            label=label,
        )
        if not 0 <= readout_weight < float("inf"):
            raise ConfigurationError(f"found readout_weight={readout_weight}, expected a number of at least 0")
        self.save_hyperparameters({"readout_weight": readout_weight})
        for chosen in ("learning_rates", "held_out"):  # nothing is chosen here
            self.hparams.pop(chosen)
        self.readouts = nn.ModuleList()

    def configure_model(self) -> None:
        """Read the experts, build their β-average, and copy their heads as the first readouts."""
        if self.student is not None:
            return
        super().configure_model()
        self.readouts = nn.ModuleList([self._readout(network) for network in self.teachers])

    def on_fit_start(self) -> None:
        """Note which task each training sample is from, and fit the student's head, unless a checkpoint has one."""
        super().on_fit_start()
        plot_against_epochs(self, ["train/readout_loss"])
        calibration = self._data().training_calibration()
        self._parts = calibration.part.to(self.device)
        if self.trainer.ckpt_path is None:
            self._fit_head(calibration)

    def _fit_head(self, calibration: Calibration) -> None:
        batches = [batch.to(self.device) for batch in calibration]
        assert self.student is not None
        with torch.no_grad():
            outputs = self._outputs
            if outputs is None:
                outputs = torch.cat([self.expert_outputs(batch) for batch in batches], dim=1)
                self.passes += calibration.num_samples * len(self.teachers)
            features = FeatureMap(self.student, batches)
            inputs = MergeInputs(
                [parameters_of(network) for network in self.teachers], expert_outputs=outputs, features=features
            )
            fitted = HeadFit().merge(inputs, self.hparams["code_row"])
        if self.trainer.world_size > 1:  # all processes must start alike, to the last bit
            fitted = self.trainer.strategy.broadcast({name: tensor.cpu() for name, tensor in fitted.items()})
        self.passes += features.passes
        fill_network(self.student, {**self.student.state_dict(), **fitted}, "the start of readout_distillation")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the coding loss plus the weighted readout loss of one batch of positions and inputs."""
        positions, inputs = batch
        outputs = self._training_outputs(positions, inputs)
        assert self.student is not None
        features, logits = features_and_logits(self.student, inputs)
        loss = self._coding_loss(logits, self.target(outputs), "train")
        parts = self._parts[positions]
        read = torch.stack([readout(features) for readout in self.readouts])
        own = torch.arange(len(parts), device=parts.device)
        errors = full_precision(read[parts, own]) - full_precision(outputs[parts, own])
        readout_loss = 0.5 * errors.square().sum(1).mean()
        self.log("train/readout_loss", readout_loss, on_step=False, on_epoch=True, batch_size=len(own), sync_dist=True)
        total: Tensor = loss + self.hparams["readout_weight"] * readout_loss
        return total

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return Adam over the coded model and the readouts, under a one-cycle schedule."""
        adam = self._adam()
        adam.add_param_group({"params": list(self.readouts.parameters())})
        schedule = _OneCycle(
            adam,
            self.hparams["lr"],
            total_steps=self.steps,
            # A rise of exactly one step has no length, which OneCycleLR divides by; so it is a little longer.
            pct_start=0.1 if 0.1 * self.steps != 1 else 0.11,
            anneal_strategy="linear",
            cycle_momentum=False,
        )
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

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


class _OneCycle(OneCycleLR):
    """One cycle, and after its last step the learning rate that it ended with."""

    def get_lr(self) -> list[float | Tensor]:
        return self.get_last_lr() if self.last_epoch >= self.total_steps else super().get_lr()
