"""Refit: every layer of the average fitted anew, in the order of execution, on the coded network's own inputs."""

from collections.abc import Sequence

from coin.core.choices import check_integer, check_number
from coin.files.tensors import weighted_sum
from coin.merging.average import average_parameters
from coin.merging.body import FitOptions, Folded
from coin.merging.experts import Experts, fill
from coin.merging.method import Adapters, CodedModel, Compress, Method
from coin.networks.batchnorm import BatchNormPolicy


class Refit(Method):
    """Every layer of the β-average refitted on the coded network's own inputs, then the head.

    Let a be the coded network's input of a layer, all layers before it being refitted already, z_i expert i's output of
    the layer for the same sample, with the BatchNorm behind it, and W̄ the β-average of the experts' maps with their
    BatchNorms folded in, γ/σ·W. The layer becomes the minimiser of

        Σ_i β_i E_{x∈T_i} ‖W a(x) + b − z_i(x)‖² + λ ‖W − W̄‖²

    over the calibration samples and their positions, λ = ridge × the mean diagonal entry of the covariance of a. A
    grouped convolution is a regression for each group, a normalisation that follows no linear map one for each channel.
    A BatchNorm becomes an identity that carries b. What cannot be refitted (an embedding, a weight that is used twice)
    stays averaged, and is named. At last the head is fitted to Σ_i β_i f_i (`fit_head`). No labels, no training.

    It takes one forward pass of every expert, on its own task's samples alone, and one of the coded network,
    in which every layer is fitted just before it is called, at some positions of every sample (`chosen_places`). Where
    activations do not fit `memory_mib`, it takes as many samples as fit, with a warning; where experts' outputs do not
    fit a quarter of it, experts run several times.

    With `adapters` (`AdapterFit`) b is every expert's own, and a sample goes on through its own expert's: the network
    need not be right for all experts at once, and only the lost expert's head reads it.

    Source: this project's. Related, none of which codes: RegMean++ (the merged network's inputs), Chain of Merges, LOT.

    Args:
        ridge: λ, relative and dimensionless, above 0.
        head: Whether the head is fitted at last; with adapters it is not, for the experts' own are read.
        memory_mib: Bound on the coded network's activations, in MiB; by default 8192, on a GPU half of what is free.
        label: Name of this variant in results.
        compress: As for every method (`MergeMethod`); it is rounded while it is refitted (`pack`).

    >>> coin.merge_networks(coin.Refit(), experts, code, calibration=inputs).chosen[0]["averaged"]
    []
    """

    name = "refit"
    batchnorm = BatchNormPolicy.keep

    def __init__(
        self,
        ridge: float = 0.1,
        *,
        head: bool = True,
        memory_mib: int | None = None,
        label: str | None = None,
        compress: Compress = None,
        adapters: Adapters = None,
    ) -> None:
        check_number("ridge", ridge, low=0, strict=True)
        check_integer("memory_mib", 1 if memory_mib is None else memory_mib, 1)
        self.ridge = ridge
        self.head = head
        self.memory_mib = memory_mib
        super().__init__(label, compress, adapters=adapters)

    @property
    def fit_options(self) -> FitOptions:
        """How the body is fitted: every unit, and the head or adapters."""
        return FitOptions(self.ridge, self.head, self.adapters, self.memory_mib)

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Make the body, the β-average of the experts' maps with their BatchNorms folded in; see `Method.make`."""
        average = experts.empty_model().eval()
        parameters = average_parameters(experts.parameters, row)
        buffers = weighted_sum(experts.buffers, row)
        fill(average, {**parameters, **buffers})
        states = [record.state for record in experts.source.records]
        start = Folded.of(average, experts, self.label, states, row)
        chosen = {"ridge": self.ridge, "averaged": start.rest}
        return CodedModel(start.network, chosen, start)
