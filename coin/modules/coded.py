"""A code with its networks: the experts and the coded models that stand by for them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from coin.batches import Batch, Forward, adapted, checked
from coin.coding import Answers, Code, Decoder, DecoderConfig, DecoderKind, make_decoder
from coin.errors import ConfigurationError
from coin.networks import Run, pad_logits, run_network
from coin.networks.stages import common_widths
from coin.statistics.guard import eval_mode


class Coded(LightningModule):
    """N experts, R coded models and the code between them.

    ``forward`` returns the encoded outputs: what the coded models answer in place of Σ_i β_i f_i. `answers` returns
    what all servers answer, and `decode` a lost expert's logits. The networks run in eval mode and without gradients;
    their own modes and what requires gradients are left as found.

    Args:
        code: The code, R×N.
        experts: The N experts.
        coded: The R coded models, one a row of the code.
        names: The experts' tasks; ``0``, ``1``, … by default.
        forward: (network, inputs) → logits ``[B, C]``, where networks are not called with one tensor; inputs may then
            be mappings of tensors too.

    Raises:
        ConfigurationError: The numbers of experts or coded models do not fit the code.
    """

    def __init__(
        self,
        code: Code,
        experts: Sequence[nn.Module],
        coded: Sequence[nn.Module],
        names: Sequence[str] | None = None,
        forward: Forward | None = None,
    ) -> None:
        super().__init__()
        if len(experts) != code.num_experts or len(coded) != code.num_coded:
            raise ConfigurationError(
                f"found {len(experts)} experts and {len(coded)} coded models, the code is for {code.num_experts} "
                f"and {code.num_coded}; give as many, or another code"
            )
        self.code = code
        self.names = tuple(names) if names is not None else tuple(str(index) for index in range(len(experts)))
        self.experts = nn.ModuleList([adapted(network, forward) for network in experts])
        self.coded = nn.ModuleList([adapted(network, forward) for network in coded])
        self.decoder: Decoder | None = None
        self.training = False

    def train(self, mode: bool = True) -> "Coded":
        """Leave the networks' modes alone: nothing here is trained, and whatever they are, they run in eval mode."""
        return self

    @torch.no_grad()
    def forward(self, inputs: Batch) -> Tensor:
        """Return the coded models' logits ``[R, B, C]`` for inputs ``[B, ...]``."""
        with eval_mode(self.coded):
            return _padded([network(checked(inputs, network)) for network in self.coded])

    @torch.no_grad()
    def answers(
        self, inputs: Batch, *, features: bool = False, stages: bool = False, erased: Sequence[int] = ()
    ) -> Answers:
        """Run every server that is not lost, once.

        Args:
            inputs: ``[B, ...]``.
            features: Whether the servers answer with penultimate features beside their logits.
            stages: Whether these are the features of all stages.
            erased: Lost experts, which do not run: their entries are NaN.
        """
        with eval_mode(self):
            return server_answers(self.experts, self.coded, checked(inputs, self.coded[0]), features, stages, erased)

    def fit_decoder(
        self,
        calibration: Sequence[Batch],
        erased: Sequence[int],
        kind: DecoderKind | str | DecoderConfig,
        tasks: Tensor | None = None,
    ) -> "Coded":
        """Choose how lost experts are decoded from here on.

        Args:
            calibration: Batches of inputs ``[B, ...]``, unlabelled; the linear decoder does not look at them.
            erased: Indices of the lost experts.
            kind: The decoder: a kind with its default options, or a configuration.
            tasks: Of which expert's task each input is, int64 over all batches, for ``fitted_on: own``.
        """
        decoder = make_decoder(kind, self.code, erased)
        if decoder.needs_fit:
            parts = [self._answers_for(decoder, batch) for batch in calibration]
            decoder.fit(replace(Answers.concatenate(parts), tasks=tasks))
        self.decoder = decoder
        return self

    def decode(self, inputs: Batch) -> Tensor:
        """Return the lost experts' logits ``[|erased|, B, C]``, from the servers that are left.

        Raises:
            ConfigurationError: `fit_decoder` has not been called.
        """
        if self.decoder is None:
            raise ConfigurationError("found no decoder; call fit_decoder with the lost experts first")
        return self.decoder.decode(self._answers_for(self.decoder, inputs, self.decoder.erased))

    def _answers_for(self, decoder: Decoder, inputs: Batch, erased: Sequence[int] = ()) -> Answers:
        config = decoder.config
        return self.answers(inputs, features=config.reads_features, stages=config.reads_stages, erased=erased)


def server_answers(
    experts: nn.ModuleList, coded: nn.ModuleList, inputs: Batch, features: bool, stages: bool, erased: Sequence[int]
) -> Answers:
    """Run every server that is not lost, once; see `Coded.answers`."""
    servers = [*(None if index in erased else network for index, network in enumerate(experts)), *coded]
    found = [None if network is None else run_network(network, inputs, features, stages) for network in servers]
    arrived = [run for run in found if run is not None]
    missing = Run(arrived[0].features[:, :0], torch.full_like(arrived[0].logits, torch.nan))
    runs = [missing if run is None else run for run in found]
    logits, count = _padded([run.logits for run in runs]), len(experts)
    return Answers(
        experts=logits[:count],
        coded=logits[count:],
        expert_features=[run.features for run in runs[:count]] if features else None,
        coded_features=[run.features for run in runs[count:]] if features else None,
        feature_widths=common_widths(arrived),
    )


def _padded(logits: Sequence[Tensor]) -> Tensor:
    width = max(entry.shape[1] for entry in logits)
    return torch.stack([pad_logits(entry, width) for entry in logits])
