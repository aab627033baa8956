"""Weights rounded to few bits while they are fitted, so that what is fitted after them makes up for the errors."""

import torch
from torch import Tensor

from coin.networks.compressed import Reference
from coin.networks.delta import Rounded, matrix_shape, nearest, quantise

_BLOCK = 128
"""Columns whose errors are carried over to the rest at a time."""


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
        shape = self._tensors[name].shape
        return len(shape) > 1 and matrix_shape(shape)[1] * (16 - self._bits) > 16

    def weight(self, name: str) -> Tensor:
        """Return a rounded weight as it is read back."""
        base = self._tensors[name]
        return base + self.rounded[name].dense().reshape(base.shape).to(base)

    def round(self, name: str, weight: Tensor) -> Tensor:
        """Round a weight to the nearest and return it."""
        base = self._tensors[name]
        self.rounded[name] = quantise((weight.cpu() - base).reshape(matrix_shape(base.shape)), self._bits)
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


def round_columns(wanted: Tensor, scales: Tensor, bits: int, metric: Tensor) -> Tensor:
    """Return the codes [G, O, K] of matrices rounded column by column, the columns to come making up for the errors.

    With M = metric and Uᵀ U = M⁻¹, U upper triangular, column k is rounded to q_k and every later one l becomes
    w_l − (w_k − q_k) U_kl / U_kk, the minimiser of tr((q − w) M (q − w)ᵀ) given the columns rounded so far. Columns go
    by falling M_kk.

    Source: Frantar et al., *GPTQ* (ICLR 2023, arXiv 2210.17323), algorithm 1.

    Args:
        wanted: [G, O, K].
        scales: Of every entry, with the sign that says which levels it takes, [G, O, K], bfloat16.
        bits: b.
        metric: [G, K, K], positive definite.
    """
    order = metric.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True)
    wanted, scales, metric = wanted[..., order], scales[..., order], metric[:, order][:, :, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(metric))
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty(wanted.shape, dtype=torch.uint8)
    for start in range(0, len(order), _BLOCK):
        end = min(start + _BLOCK, len(order))
        errors = torch.zeros_like(wanted[..., start:end])
        for k in range(start, end):
            column, scale = wanted[..., k].flatten(), scales[..., k].flatten()
            code = nearest(column[:, None].float(), scale, bits)
            codes[..., k] = code.view(codes.shape[:2])
            error = (column - Rounded(code, scale, bits).dense()[:, 0]).view(codes.shape[:2])
            errors[..., k - start] = error / upper[:, k, k, None]
            wanted[..., k:end] -= errors[..., k - start, None] * upper[:, None, k, k:end]
        wanted[..., end:] -= errors @ upper[:, start:end, end:]
    return codes[..., order.argsort()]
