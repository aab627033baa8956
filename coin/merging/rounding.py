"""A network's matrices rounded while it is fitted, the columns to come making up for the errors of earlier ones."""

import torch
from torch import Tensor, nn

from coin.networks.delta import (
    SMALLEST,
    Rounded,
    is_smaller_rounded,
    matrix_shape,
    nearest,
    quantise,
)

SHORT = 128  # values of a row below which bodies have it in 8 bits whatever the bits of the others
_BLOCK = 128  # columns whose errors are carried over to the rest at a time


class Rounding:
    """Rounds a network's matrices to few bits a value; `rounded` holds those so far."""

    def __init__(self, network: nn.Module, bits: int) -> None:
        self.rounded: dict[str, Rounded] = {}
        self._like = network.state_dict()
        self._bits = bits

    def bits(self, name: str) -> int:
        """Return the bits a value: 8 for short rows, as of depthwise kernels, which few bits cost much."""
        _, columns = matrix_shape(self._like[name].shape)
        return 8 if columns < SHORT else self._bits

    def takes(self, name: str) -> bool:
        """Whether a tensor is a matrix that its rounded form is smaller than in float16."""
        tensor = self._like[name]
        return tensor.is_floating_point() and is_smaller_rounded(tensor.shape, self.bits(name))

    def weight(self, name: str) -> Tensor:
        """Return a rounded weight as it is read back."""
        like = self._like[name]
        return self.rounded[name].dense().reshape(like.shape).to(like.dtype)

    def round(self, name: str, weight: Tensor) -> Tensor:
        """Round a weight to the nearest and return it."""
        matrix = weight.double().reshape(matrix_shape(weight.shape))
        self.rounded[name] = quantise(matrix, self.bits(name)).cpu()
        return self.weight(name)

    def step(self, name: str, weight: Tensor, step: Tensor, metric: Tensor | None) -> Tensor:
        """Round a weight after a step of a regression; return the step [G, O, K] from the weight to its rounded form.

        What is rounded is the weight with the step in it. The step is the best one: another that is off by E costs
        tr(E M Eᵀ) more, summed over groups, which is kept small: later columns make up for the errors of earlier ones
        (`round_columns`).

        Args:
            name: The weight's name.
            weight: The weight before the step [G·O, …], the rows of all G groups in turn.
            step: The step of each group's map [G, O, K].
            metric: M [G, K, K]; without it every value is rounded to the nearest.
        """
        bits = self.bits(name)
        before = weight.double().reshape(step.shape)
        wanted = before + step
        rows = matrix_shape(weight.shape)  # each with a scale
        rounded = quantise(wanted.reshape(rows), bits)
        # A convolution with a single output has a scale for each of its inputs.
        has_row_each = rows[0] == wanted.shape[0] * wanted.shape[1]
        if metric is not None and has_row_each:
            scales = rounded.scale.view(wanted.shape[:2])
            levels = round_columns(wanted, scales, bits, metric)
            rounded = Rounded.of(levels.reshape(rows), rounded.scale, bits)
        self.rounded[name] = rounded.cpu()
        after = rounded.dense().reshape(step.shape)
        return (after - before).to(step)


def round_columns(wanted: Tensor, scales: Tensor, bits: int, metric: Tensor) -> Tensor:
    """Return the levels [G, O, K] of matrices rounded column by column, the columns to come making up for the errors.

    With M = metric [G, K, K] = R Rᵀ, positive definite, and U = R⁻¹, both upper triangular, column k is rounded to q_k
    and every later one l becomes w_l − (w_k − q_k) U_kl / U_kk, the minimiser of tr((q − w) M (q − w)ᵀ) given the
    columns rounded so far. Columns go by falling M_kk. `scales` [G, O] are those of the rows (`Rounded`). Columns after
    a block take the errors of all its columns in one matrix product.

    Source: Frantar et al., *GPTQ* (ICLR 2023, arXiv 2210.17323), algorithm 1.
    """
    order = metric.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True)
    wanted = wanted[..., order].mT.contiguous()  # [G, K, O]
    scales = scales.float().unsqueeze(1)  # [G, 1, O]
    metric = metric[:, order][:, :, order]
    root = torch.linalg.cholesky(metric.flip(1, 2)).flip(1, 2)
    identity = torch.eye(len(order)).to(root)
    upper = torch.linalg.solve_triangular(root, identity, upper=True)
    diagonal = upper.diagonal(dim1=1, dim2=2).unsqueeze(2)
    shares = (upper / diagonal).mT.contiguous()  # [G, later k, earlier k]

    divisors = scales.clamp(min=SMALLEST)

    found = torch.empty(wanted.shape, dtype=torch.int8, device=wanted.device)
    for start in range(0, len(order), _BLOCK):
        end = min(start + _BLOCK, len(order))
        errors = torch.empty_like(wanted[:, start:end])
        for k in range(start, end):
            now = slice(k, k + 1)
            in_block = slice(k - start, k - start + 1)
            earlier = errors[:, : k - start]
            own_shares = shares[:, now, start:k]
            column = torch.baddbmm(wanted[:, now], own_shares, earlier, alpha=-1)  # [G, 1, O]
            level = nearest(column.float() / divisors, bits)
            found[:, now] = level
            errors[:, in_block] = column - level * scales
        later_shares = shares[:, end:, start:end]
        wanted[:, end:] -= later_shares @ errors
    in_place = found[:, order.argsort()]
    return in_place.transpose(1, 2).contiguous()
