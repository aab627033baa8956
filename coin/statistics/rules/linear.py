"""The rules for linear maps, applied at one position a sample or at many, and for `embedding`, on one-hot rows."""

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

    Let g_vt [O] be the cotangents of one sample's outputs. The gradient of Uᵥ · f by W is Σ_t g_vt a_tᵀ [O, K], since W
    is used at every position. Wanted is its square, entry by entry, added up over v and over the samples.

    The **direct rule** forms the gradients and squares them: V·T·O·K multiplications, and V·O·K numbers in memory.

    The **Gram rule** writes the square of the sum over positions as a double sum, with v in the bracket alone:

        Σ_v (Σ_t g_vto a_tk)² = Σ_tt' (Σ_v g_vto g_vt'o) a_tk a_t'k.

    The terms of t, t' and of t', t are equal, so the pairs t ≤ t' do, those of t < t' counted twice. With P = T(T+1)/2
    pairs that is the product of two matrices, [O, B·P] of contracted cotangents and [B·P, K] of products of inputs. The
    first is added up while blocks of cotangents come in, the product is taken once, in `finish`: its cost does not
    depend on V. With one position it is Sᵀ a², S = Σ_v g². With many positions P is large: then the direct rule.
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
            self.add_weight(rows, totals["weight"])

    def add_weight(self, g: Tensor, weight: Tensor) -> None:
        """Add the weight's squares, or defer them, for cotangents g [V, B, T, O]."""
        cotangents, samples, positions, _ = g.shape
        k = len(self.inputs) // samples
        total = self.matrices(weight)
        takes_gram = k == 1 or self.many_rows
        if takes_gram and prefers_gram(positions, cotangents, total.shape[-1]):
            pairs = contract_pairs(g)
            if self._pairs is not None:
                pairs.add_(self._pairs)
            self._pairs = pairs
        else:
            for n, rows in enumerate(torch.split(self.inputs, k)):
                add_direct(total, g[:, n], self.patches(rows.to(g.dtype)))

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
        count = len(self.weight)
        tokens = self.inputs.reshape(samples, -1)
        numbers = torch.arange(samples, device=tokens.device)
        keys = tokens + count * numbers[:, None]  # of a sample's token
        found, places = torch.unique(keys, return_inverse=True)
        cotangents = g.reshape(len(g), places.numel(), -1)  # [V, B·places, O]
        gradients = g.new_zeros(len(g), len(found), cotangents.shape[2])
        gradients.index_add_(1, places.flatten(), cotangents)
        squares = gradients.square_().sum(0)
        rows = found % count
        if self.padding is not None:
            is_padding = rows == self.padding % count  # which gets no gradient
            squares.masked_fill_(is_padding[:, None], 0)
        totals["weight"].index_add_(0, rows, squares)


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


def at_once(device: torch.device, floats: int, *, cached: bool = False) -> int:
    """Return how many pieces of so many floats a rule makes at a time on a device, one at least.

    If `cached`, they stay in a core's cache until they are squared: that costs a third as much.
    """
    block = CACHED if cached else BLOCK
    if device.type != "cpu":
        block = _LARGE_BLOCK
    return max(1, block // floats)


def add_direct(total: Tensor, g: Tensor, a: Tensor) -> None:
    """Add Σ_v (Σ_t g_vt a_tᵀ)² to `total` [G, O/G, K], for one sample's g [V, T, O] and inputs a [G, T, K]."""
    groups, outputs, columns = total.shape
    row = groups * columns
    height = min(outputs, at_once(total.device, row, cached=True))  # outputs of a group at a time
    step = at_once(total.device, height * row, cached=True)  # cotangents at a time
    by_group = g.view(*g.shape[:2], groups, outputs)
    by_output = by_group.permute(2, 3, 0, 1)  # [G, O/G, V, T]
    for start in range(0, outputs, height):
        piece = slice(start, start + height)
        for block in torch.split(by_output[:, piece], step, 2):
            _add_squares(total[:, piece], block, a)


def _add_squares(total: Tensor, g: Tensor, a: Tensor) -> None:
    """Add Σ_v (Σ_t g_vt a_tᵀ)² to `total` [G, o, K], for g [G, o, v, T] and a [G, T, K]."""
    rows = g.transpose(1, 2)  # [G, v, o, T]
    if len(g) == 1:  # a product a cotangent, so that nothing is copied
        products = rows[0] @ a
    else:
        by_group = rows.flatten(1, 2)
        products = by_group @ a
    gradients = products.view(*rows.shape[:3], -1)  # [G, v, o, K]
    if g.shape[2] == 1:
        total.addcmul_(gradients[:, 0], gradients[:, 0])
    else:
        total.add_(gradients.square_().sum(1))
