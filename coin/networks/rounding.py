"""Weights rounded to few bits while they are fitted, so that what is fitted after them makes up for the errors."""

from torch import Tensor

from coin.networks.compressed import Reference
from coin.networks.delta import Rounded, added, matrix_shape, quantise, round_columns


class Rounding:
    """Rounds a network's matrices to b bits a value, as deltas from a reference with a scale a row.

    Args:
        reference: What the deltas are from.
        bits: b.

    Attributes:
        rounded: The deltas rounded so far, by name.
    """

    def __init__(self, reference: Reference, bits: int) -> None:
        self.reference, self._bits, self._tensors = reference, bits, reference.tensors
        self.rounded: dict[str, Rounded] = {}

    def takes(self, name: str) -> bool:
        """Whether a tensor is a matrix that its rounded form is smaller than in float16."""
        shape, floats = self._tensors[name].shape, self._tensors[name].is_floating_point()
        return len(shape) > 1 and floats and matrix_shape(shape)[1] * (16 - self._bits) > 16

    def weight(self, name: str) -> Tensor:
        """Return a rounded weight as it is read back."""
        return added(self._tensors[name], self.rounded[name].dense())

    def round(self, name: str, weight: Tensor) -> Tensor:
        """Round a weight to the nearest and return it."""
        base = self._tensors[name].double()
        self.rounded[name] = quantise((weight.double().cpu() - base).reshape(matrix_shape(base.shape)), self._bits)
        return self.weight(name)

    def step(self, name: str, weight: Tensor, step: Tensor, metric: Tensor, turned: bool = False) -> Tensor:
        """Round weight + step, and return the step to what it became.

        Args:
            name: The weight's.
            weight: As it is.
            step: ΔW [G, O, K], the optimal one.
            metric: M [G, K, K]; a step E beside the optimal one costs tr(E M Eᵀ).
            turned: Whether the weight is ΔW's transpose.
        """
        base = self._tensors[name].double()

        def grouped(x: Tensor) -> Tensor:
            return (x.T if turned else x).reshape(step.shape)

        def flat(x: Tensor) -> Tensor:
            x = x.flatten(0, 1)
            return (x.T if turned else x).reshape(matrix_shape(base.shape))

        now = grouped(weight.double().cpu() - base)
        wanted = now + step.cpu()
        scale = quantise(flat(wanted), self._bits).scale
        scales = grouped(scale[:, None].expand(matrix_shape(base.shape)).reshape(base.shape))
        codes = round_columns(wanted, scales, self._bits, metric.cpu())
        self.rounded[name] = Rounded(flat(codes), scale, self._bits)
        return (grouped(self.rounded[name].dense().reshape(base.shape)) - now).to(step)
