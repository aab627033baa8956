"""The rules for linear maps, applied at one position a sample or at many, and for `embedding`, on one-hot rows."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from coin.statistics.rules import Call, Totals

# Floats that a rule makes at a time on a CPU, as a direct rule's per-sample gradients.
BLOCK = 1 << 20
_LARGE_BLOCK = 1 << 26  # on other devices, where many small products cost more: 256 MiB
# Floats of a gradient that stay in a core's cache until they are squared, as measured on CPUs.
CACHED = 1 << 18


@dataclass(eq=False)
class LinearCall(Call):
    """y_t = W a_t + b at T positions a sample: weight += Σ_nv (Σ_t g_vt a_tᵀ)², bias += Σ_nv (Σ_t g_vt)².

    The Gram rule for few positions, Σ_v (Σ_t g_vt a_t)² = Σ_{t≤t'} w_tt' a_t a_t' (Σ_v g_vt g_vt') with w = 1 on the
    diagonal and 2 off it, contracts the cotangents first and multiplies by the inputs at the end. With one position
    and S = Σ_v g² that is Sᵀ a². For many positions, the direct rule forms the gradients and squares them.
    """

    many_rows: ClassVar[bool] = True  # whether the Gram rule can take several rows a sample
    # Contracted cotangents [B, P, O], of pairs of positions.
    _pairs: Tensor | None = field(default=None, init=False)

    @override
    def accumulate(self, g: Tensor, samples: int, totals: Totals) -> None:
        rows = self.positions(g, samples)
        if "bias" in totals:
            gradients = rows.sum(2)  # [V, B, O]
            squares = torch.square(gradients)
            totals["bias"].add_(squares.sum((0, 1)))
        if "weight" in totals:
            self.add_weight(g, rows, totals["weight"])

    def add_weight(self, g: Tensor, rows: Tensor, weight: Tensor) -> None:
        """Add the weight's squares, or defer them, for cotangents g [V, B·k, …], which are rows [V, B, T, O]."""
        cotangents, samples, positions, _ = rows.shape
        k = g.shape[1] // samples
        total = self.matrices(weight)
        columns = total.shape[-1]
        takes_gram = k == 1 or self.many_rows
        if takes_gram and prefers_gram(positions, cotangents, columns):
            pairs = contract_pairs(rows)
            if self._pairs is not None:
                pairs.add_(self._pairs)
            self._pairs = pairs
        else:
            by_sample = torch.split(self.inputs, k)
            inputs = (self.patches(sample.to(g.dtype)) for sample in by_sample)
            add_direct(total, rows, inputs)

    @override
    def finish(self, totals: Totals) -> None:
        if self._pairs is not None:
            self.add_pairs(self._pairs, self.matrices(totals["weight"]))

    @override
    def input_gradient(self, g: Tensor, weight: Tensor) -> Tensor:
        return g @ weight

    @override
    def output(self, inputs: Tensor, weight: Tensor) -> Tensor:
        return F.linear(inputs, weight, self.bias)

    def positions(self, g: Tensor, samples: int) -> Tensor:
        """Return cotangents [V, B·k, …] as [V, B, T, O]."""
        return g.reshape(len(g), samples, -1, g.shape[-1])

    def patches(self, rows: Tensor) -> Tensor:
        """Return the inputs a [G, T, K] of G groups that W is applied to in one sample's rows [k, …]."""
        return rows.reshape(1, -1, rows.shape[-1])

    def matrices(self, total: Tensor) -> Tensor:
        """Return the weight's accumulator as a view [G, O/G, K]."""
        return total[None]

    def add_pairs(self, pairs: Tensor, total: Tensor) -> None:
        """Add the products of contracted cotangents [B, P, O] with the inputs to a total [G, O/G, K]."""
        columns = total.shape[-1]
        inputs = self.inputs.reshape(len(pairs), -1, columns)
        add_gram(total, pairs, inputs.to(total.dtype))


@dataclass(eq=False)
class EmbeddingCall(Call):
    """y = weight[tokens]: per sample, a token's cotangents are summed over its places before they are squared."""

    padding: int | None

    @override
    def input_gradient(self, g: Tensor, weight: Tensor) -> Tensor:
        raise AssertionError("tokens have no gradient")

    @override
    def accumulate(self, g: Tensor, samples: int, totals: Totals) -> None:
        number = len(g)
        width = g.shape[-1]
        cotangents = g.reshape(number, samples, -1, width)  # [V, B, places, O]
        by_sample = self.inputs.reshape(samples, -1)
        for n, tokens in enumerate(by_sample):
            found, places = torch.unique(tokens, return_inverse=True)
            gradients = g.new_zeros(number, len(found), width)
            gradients.index_add_(1, places, cotangents[:, n])
            squares = torch.square(gradients).sum(0)
            if self.padding is not None:
                squares[found == self.padding % len(self.weight)] = (
                    0  # the padding token gets no gradient
                )
            totals["weight"].index_add_(0, found, squares)


def prefers_gram(positions: int, cotangents: int, columns: int) -> bool:
    """Say whether the Gram rule is the quicker one for T positions, V cotangents and W [O, K], as measured on CPUs."""
    # The Gram rule multiplies K·T(T+1)/2 times inside a matrix product, and V·T(T+1)/2 times outside, each as long as
    # 17 inside; the direct rule V·T·K times inside, and squares V·K numbers, as long as 8.
    pairs = positions * (positions + 1) // 2
    gram_cost = (17 * cotangents + columns) * pairs
    direct_cost = cotangents * columns * (positions + 8)
    return positions == 1 or gram_cost <= direct_cost


@lru_cache(maxsize=64)
def position_pairs(positions: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs t ≤ t' of T positions: two index vectors [P] and the weights [P], 1 on the diagonal, else 2."""
    first, second = torch.triu_indices(positions, positions, device=device)
    weights = torch.where(first == second, 1, 2)
    return first, second, weights


def contract_pairs(g: Tensor) -> Tensor:
    """Return w_tt' Σ_v g_vt g_vt' over the pairs of positions, [B, P, O], from g [V, B, T, O]."""
    positions = g.shape[2]
    products = []
    for t in range(positions):
        own = g[:, :, t : t + 1]
        following = g[:, :, t:]
        products.append((own * following).sum(0))
    _, _, weights = position_pairs(positions, g.device)
    return torch.cat(products, 1).mul_(weights[:, None])


def add_gram(total: Tensor, pairs: Tensor, a: Tensor) -> None:
    """Add Σ_n Σ_p pairs_np a_t a_t' to `total` [G, O/G, K], of contracted pairs [B, P, O] and inputs a [B, T, G·K]."""
    groups, outputs, columns = total.shape
    _, positions, _ = a.shape
    if positions == 1:
        products = torch.square(a)
    else:
        first, second, _ = position_pairs(positions, a.device)
        others = a.index_select(1, second)
        products = a.index_select(1, first).mul_(others)
    by_group = pairs.reshape(-1, groups, outputs)
    left = by_group.permute(1, 2, 0)  # [G, O/G, B·P]
    right = products.view(-1, groups, columns).transpose(0, 1)  # [G, B·P, K]
    if groups == 1:
        total[0].addmm_(left[0], right[0])
    else:
        total.add_(torch.bmm(left, right))
    # A sum of squares, of which rounding may leave less than nothing where positions cancel.
    if positions > 1:
        total.clamp_min_(0)


def at_once(device: torch.device, floats: int) -> int:
    """Return how many pieces of so many floats a rule makes at a time on a device; one at least."""
    block = BLOCK if device.type == "cpu" else _LARGE_BLOCK
    return max(1, block // floats)


def add_direct(total: Tensor, g: Tensor, inputs: Iterable[Tensor]) -> None:
    """Add Σ_n Σ_v (Σ_t g_vt a_tᵀ)² to `total` [G, O/G, K], for g [V, B, T, O] and each sample's inputs a [G, T, K].

    Gradients are formed in pieces that stay in a core's cache until they are squared: that costs a third as much.
    """
    groups, outputs, columns = total.shape
    floats = total.numel()
    if 2 * floats <= CACHED or total.device.type != "cpu":
        step = at_once(total.device, floats)  # cotangents at a time
        height = outputs  # of a group, at a time
    else:
        step = 1
        height = max(1, CACHED // (groups * columns))
    by_group = g.view(*g.shape[:3], groups, outputs)
    most_cotangents = min(step, len(g))
    most_rows = groups * min(height, outputs)
    buffer = total.new_empty(most_cotangents * most_rows * columns)
    for n, a in enumerate(inputs):
        for start in range(0, outputs, height):
            piece = slice(start, start + height)
            chosen = by_group[:, n, :, :, piece]  # [V, T, G, o]
            for block in torch.split(chosen, step):
                _add_squares(total[:, piece], block, a, buffer)


def _add_squares(total: Tensor, g: Tensor, a: Tensor, buffer: Tensor) -> None:
    """Add Σ_v (Σ_t g_vt a_tᵀ)² to `total` [G, o, K], for g [v, T, G, o] and a [G, T, K]; the buffer is overwritten."""
    groups, _, columns = total.shape
    cotangents = len(g)
    left = g.permute(2, 0, 3, 1)  # [G, v, o, T]
    floats = cotangents * total.numel()
    flat = buffer[:floats]
    gradients = flat.view(groups, -1, columns)  # [G, v·o, K]
    if groups == 1:  # a product a cotangent, so that nothing is copied
        right = a.expand(cotangents, -1, -1)
        by_cotangent = flat.view(cotangents, -1, columns)
        torch.bmm(left[0], right, out=by_cotangent)
    else:
        torch.bmm(left.flatten(1, 2), a, out=gradients)
    if cotangents == 1:
        total.addcmul_(gradients, gradients)
    else:
        squares = gradients.square_().view(groups, cotangents, -1, columns)
        total.add_(squares.sum(1))
