"""What adapters are fitted to: moments of a unit's samples, and corrections of low rank of what a body's map lacks."""

from typing import NamedTuple

import torch
from torch import Tensor

from coin.networks.delta import Rounded, quantise
from coin.networks.kept import BITS
from coin.statistics.solvers import is_round_off, products, solve_ridge

_SHRUNK = 0.01  # of the mean variance of a unit's outputs: the ridge that draws their scales to 1
_MORE = 8  # directions beside the r wanted, in the search for singular vectors
_ITERATIONS = 4  # of this search


class Moments:
    """The first two moments of a unit's inputs a [G, n, K] and wanted outputs z [P, q, G·O], of one expert's samples.

    Args:
        inputs: a.
        wanted: z, as many rows as a.
        weights: Of the rows [P, q].
        intercept: Whether means are subtracted.
    """

    def __init__(self, inputs: Tensor, wanted: Tensor, weights: Tensor, intercept: bool) -> None:
        groups, count, unknowns = inputs.shape
        shares = (weights / weights.sum()).flatten().to(inputs)  # [n]
        flat = wanted.to(inputs).reshape(count, groups, -1)
        z = flat.transpose(0, 1)  # [G, n, O]
        self.mean_a = shares @ inputs  # [G, K]
        self.mean_z = shares @ z  # [G, O]
        if not intercept:
            self.mean_a.zero_()
            self.mean_z.zero_()
        root = shares.sqrt()[:, None]
        self._a = (inputs - self.mean_a[:, None]) * root
        self._z = (z - self.mean_z[:, None]) * root
        if intercept:  # the round-off of constant inputs is no signal
            scale = self._a.square().sum((1, 2)) / unknowns
            is_constant = is_round_off(scale, self._a, self.mean_a[:, None], shares[None])
            self._a.masked_fill_(is_constant[:, None, None], 0)
        self.cross = self._a.mT @ self._z  # [G, K, O]
        # With fewer rows products go by these.
        self._gram = products(self._a) if count >= unknowns else None

    def times(self, x: Tensor) -> Tensor:
        """Return cov(a) x for x [G, K, m]."""
        if self._gram is None:
            return self._a.mT @ (self._a @ x)
        return self._gram @ x

    def gram(self) -> Tensor:
        """Return cov(a) [G, K, K]."""
        return products(self._a) if self._gram is None else self._gram

    def lacking(self, body: Tensor, own: Tensor, ridge: float) -> "Lacking":
        """Return what a body's map lacks of an expert's, Wᵀ of both [1, K, O], with μ relative to the mean variance."""
        a = self._a
        mean = a.square().sum((1, 2)) / body.shape[1]
        is_constant = mean == 0  # then the difference itself is cut
        damping = (ridge * mean).masked_fill(is_constant, 1)
        if self._gram is None:
            residual = self._z - a @ own
            step = a.mT @ solve_ridge(products(a.mT), residual, damping, is_constant)
        else:
            residual = self.cross - self._gram @ own
            step = solve_ridge(self._gram, residual, damping, is_constant)
        columns = own + step - body
        return Lacking(columns[0], damping[0], self)

    def scale(self, columns: Tensor) -> Tensor:
        """Return the scale [G·O] with which a map Wᵀ [G, K, O] gives the outputs wanted."""
        variance = (columns * self.times(columns)).sum(1)  # [G, O]
        covariance = (columns * self.cross).sum(1)
        ridge = _SHRUNK * variance.mean()
        damped = variance + ridge
        ratio = (covariance + ridge) / damped
        return ratio.where(damped > 0, 1.0).flatten()

    def shift(self, columns: Tensor, scale: Tensor) -> Tensor:
        """Return the intercept [G·O] with which a map Wᵀ [G, K, O] and these scales [G·O] give the outputs wanted."""
        means = (self.mean_a[:, None] @ columns).flatten()
        return self.mean_z.flatten() - scale * means


class Lacking(NamedTuple):
    """What a body's map lacks of an expert's, B, with the metric M = cov(a) + μI of the expert's inputs."""

    columns: Tensor  # Bᵀ [K, O]
    damping: Tensor  # μ
    moments: Moments

    def damped(self, x: Tensor) -> Tensor:
        """Return M x for x [K, m]."""
        return self.moments.times(x[None])[0] + self.damping * x

    def squared(self, x: Tensor) -> Tensor:
        """Return B M Bᵀ x for x [O, m]."""
        return self.columns.T @ self.damped(self.columns @ x)


class Factors(NamedTuple):
    """A correction in few bits, of maps that are transposed: Bᵀ = innerᵀ coreᵀ outer, without a core innerᵀ outer."""

    outer: Rounded  # [r, O]
    inner: Rounded  # [r, K']
    core: Rounded | None = None  # [r, r]

    def map(self, like: Tensor) -> Tensor:
        """Return Bᵀ [K', O] as it is read back."""
        outer = self.outer.dense().to(like)
        if self.core is not None:
            outer = self.core.dense().to(like).T @ outer
        return self.inner.dense().to(like).T @ outer


def low_rank(lacking: Lacking, rank: int) -> Factors:
    """Return V̂ᵀ [r, O] and V̂⁺ B [r, K] in few bits; see `AdapterFit`."""
    columns = lacking.columns
    vectors = leading(lacking, rank)
    outer = quantise(vectors.T.contiguous(), BITS)
    inverse = torch.linalg.pinv(outer.dense().to(columns).T)  # V̂⁺ [r, O]
    inner = inverse @ columns.T
    return Factors(outer, quantise(inner.contiguous(), BITS))


def leading(lacking: Lacking, rank: int) -> Tensor:
    """Return the first eigenvectors of B M Bᵀ, V [O, r]; r is at most the smaller of O and K."""
    columns = lacking.columns
    unknowns, outputs = columns.shape
    highest = min(unknowns, outputs)
    wanted = min(rank, highest)
    generator = torch.Generator().manual_seed(0)
    directions = min(wanted + _MORE, highest)
    basis = torch.randn(outputs, directions, generator=generator).to(columns)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(lacking.squared(basis)).Q
    _, rotation = torch.linalg.eigh(basis.T @ lacking.squared(basis))  # ascending
    vectors: Tensor = basis @ rotation[:, -wanted:]
    return vectors


class SharedBasis:
    """One basis for what a body's map lacks of every expert's, B_i ≈ U C_i V, with a core C_i [r, r] for each.

    U [O, r] has the first eigenvectors of Σ_i B_i M_i B_iᵀ / t_i, where t_i = tr(B_i M_i B_iᵀ), so that every expert
    counts alike. V [r, K] has the first right singular vectors, in the mean of the metrics M_i / tr M_i, of all
    Uᵀ B_i / √t_i below one another, times their singular values, so that the columns of a core are of one size. A core
    is the closest to B_i in its own metric, given what U and V became in few bits.

    The form is that of Gabrielsson et al., *Compress then Serve* (arXiv 2407.00066), which joins finished adapters in
    the plain norm.

    Args:
        rank: r.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._columns: dict[int, Tensor] = {}  # B_iᵀ, by expert
        self._damping: dict[int, Tensor] = {}
        self._weights: dict[int, Tensor] = {}  # 1 / t_i
        self._outer: Tensor | float = 0.0  # [O, O]
        self._metric: Tensor | float = 0.0  # [K, K]

    def add(self, expert: int, lacking: Lacking) -> None:
        """Take what is lacking of an expert's map."""
        columns = lacking.columns
        unknowns, outputs = columns.shape
        outer = lacking.squared(torch.eye(outputs).to(columns))
        total = outer.trace()
        weight = (1 / total).where(total > 0, 0.0)
        metric = lacking.moments.gram()[0] + lacking.damping * torch.eye(unknowns).to(columns)
        self._columns[expert] = columns
        self._damping[expert] = lacking.damping
        self._weights[expert] = weight
        self._outer = self._outer + weight * outer
        self._metric = self._metric + metric / metric.trace()

    def fit(self) -> None:
        """Find the basis of all that was taken."""
        directions = min(self.rank, *next(iter(self._columns.values())).shape)
        _, vectors = torch.linalg.eigh(self._outer)  # ascending
        left = vectors[:, -directions:]  # U [O, r]
        below = []
        for expert, columns in self._columns.items():
            root = self._weights[expert].sqrt()
            below.append(root * (columns @ left).T)
        joined = torch.cat(below)  # [N r, K]
        right = _right_vectors(joined, torch.as_tensor(self._metric), directions)
        self._outer_rounded = quantise(left.T.contiguous(), BITS)
        self._inner_rounded = quantise(right.contiguous(), BITS)

    def of_expert(self, expert: int, moments: Moments) -> Factors:
        """Return an expert's correction, given the moments of its samples."""
        lacking = Lacking(self._columns[expert], self._damping[expert], moments)
        outer = self._outer_rounded.dense().to(lacking.columns)  # [r, O]
        inner = self._inner_rounded.dense().to(lacking.columns)  # [r, K]
        damped = lacking.damped(inner.T)  # M V̂ᵀ [K, r]
        projected = torch.linalg.pinv(outer.T) @ lacking.columns.T  # Û⁺ B [r, K]
        core = projected @ damped @ torch.linalg.pinv(inner @ damped, hermitian=True)
        core_rounded = quantise(core.contiguous(), BITS)
        return Factors(self._outer_rounded, self._inner_rounded, core_rounded)


def _right_vectors(matrix: Tensor, metric: Tensor, count: int) -> Tensor:
    """Return the first right singular vectors of a matrix [n, K] in a metric [K, K], times their singular values.

    With M = L Lᵀ and A L = X S Wᵀ they are the first rows of Xᵀ A = S Wᵀ L⁻¹ [count, K].
    """
    rows, unknowns = matrix.shape
    if rows <= unknowns:
        _, vectors = torch.linalg.eigh(matrix @ metric @ matrix.T)  # ascending
        first: Tensor = vectors[:, -count:].T @ matrix
        return first
    root = torch.linalg.cholesky(metric)
    scaled = matrix @ root
    squares, vectors = torch.linalg.eigh(scaled.T @ scaled)
    sizes = squares[-count:].clamp(min=0).sqrt()
    wanted = sizes[:, None] * vectors[:, -count:].T
    found: Tensor = torch.linalg.solve_triangular(root, wanted, upper=False, left=False)
    return found
