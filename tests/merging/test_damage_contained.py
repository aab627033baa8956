"""Whatever is wrong with its inputs, a method gives a finite network, or one line that names the cause."""

import warnings

import pytest
import torch
from torch import nn

from coin.errors import CoinError, CoinWarning, NumericalError, StateError
from coin.merging import (
    Average,
    Coin,
    FeatureMap,
    FullFisher,
    GaussNewton,
    HeadFit,
    MergeInputs,
    RegMean,
    TaskArithmetic,
    Ties,
)
from coin.statistics import OutputMap, fisher_diagonal
from coin.statistics.gram import gram_sums

WEIGHTS = (0.2, 0.3, 0.5)
METHODS = {
    "average": Average(),
    "coin": Coin(),
    "coin undamped": Coin(damping=0),
    "regmean": RegMean(),
    "regmean undamped": RegMean(alpha=1, damping=0),
    "head_fit": HeadFit(),
    "full_fisher": FullFisher(),
    "full_fisher hasty": FullFisher(max_iterations=1),
    "gauss_newton": GaussNewton(),
    "task_arithmetic": TaskArithmetic(),
    "ties": Ties(),
}
USES_FISHERS = ("coin", "coin undamped", "full_fisher", "full_fisher hasty", "gauss_newton")


def inputs_for(damage: str) -> MergeInputs:
    """Three experts in float32 with everything that a method may want."""
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    generator = torch.Generator().manual_seed(7)
    samples = 1 if damage == "one sample a task" else 30
    data = [torch.randn(samples, 6, generator=generator) for _ in networks]
    if damage == "constant inputs":
        data = [torch.ones(samples, 6) for _ in networks]
    pooled = torch.cat(data)
    if damage == "outputs that overflow":
        networks[1][2].weight.data.fill_(3e38)
        networks[1][0].weight.data.mul_(100)
    with torch.no_grad():
        logits = torch.stack([network(pooled) for network in networks])
    fishers = [fisher_diagonal(network, [x]) for network, x in zip(networks, data, strict=True)]
    grams = [gram_sums(network, [x]).mean() for network, x in zip(networks, data, strict=True)]
    experts = [{key: value.detach().clone() for key, value in network.named_parameters()} for network in networks]
    if damage == "a NaN in an expert":
        experts[1]["2.bias"][0] = torch.nan
    if damage == "no Fisher anywhere":
        fishers = [{key: torch.zeros_like(value) for key, value in fisher.items()} for fisher in fishers]
    if damage == "one expert without a Fisher":
        fishers[2] = {key: torch.zeros_like(value) for key, value in fishers[2].items()}
    if damage == "tiny Fishers":
        fishers = [{key: value * 1e-40 for key, value in fisher.items()} for fisher in fishers]
    if damage == "no Gram anywhere":
        grams = [{key: torch.zeros_like(value) for key, value in gram.items()} for gram in grams]
    return MergeInputs(
        experts,
        initial={key: value.clone() for key, value in experts[0].items()},
        fishers=fishers,
        grams=grams,
        outputs=OutputMap(networks[0], [pooled]),
        expert_outputs=logits,
        expert_maps=[OutputMap(network, [x]) for network, x in zip(networks, data, strict=True)],
        features=FeatureMap(networks[0], [pooled]),
    )


HASTY = r"full_fisher stopped after 1 conjugate-gradient steps at a relative residual of \d"
SINGULAR = r"the Gram matrix of '\d\.weight' is singular with a damping of 0; raise regmean's damping"
TINY = r"the mean entry of the Fishers is \d[^\n]*, too small to divide by"
OVERFLOW = {
    **dict.fromkeys(USES_FISHERS, (StateError, "the Fisher of expert 1 is not finite: tensor '0")),
    "head_fit": (StateError, "the calibration output of expert 1 is not finite: tensor 'logits'"),
}
EVERYWHERE = r"method '[a-z_]+': the Fisher of expert 0, 1, 2 is zero everywhere"
SOMEWHERE = r"method '[a-z_]+': the Fisher of expert 2 is zero everywhere"

# Damage → method → the error or the warning that is due; where there is none, a finite network without a word.
DUE: dict[str, dict[str, tuple[type[Exception], str]]] = {
    "none": {"full_fisher hasty": (CoinWarning, HASTY)},
    "a NaN in an expert": dict.fromkeys(METHODS, (StateError, r"expert 1 is not finite: tensor '2\.bias'")),
    "no Fisher anywhere": dict.fromkeys(USES_FISHERS, (CoinWarning, EVERYWHERE)),
    "one expert without a Fisher": dict.fromkeys(USES_FISHERS, (CoinWarning, SOMEWHERE)),
    "tiny Fishers": dict.fromkeys(("full_fisher", "full_fisher hasty", "gauss_newton"), (NumericalError, TINY)),
    "no Gram anywhere": {"full_fisher hasty": (CoinWarning, HASTY)},
    "constant inputs": {"regmean undamped": (NumericalError, SINGULAR), "full_fisher hasty": (CoinWarning, HASTY)},
    "one sample a task": {"regmean undamped": (NumericalError, SINGULAR), "full_fisher hasty": (CoinWarning, HASTY)},
    "outputs that overflow": OVERFLOW,
}


@pytest.mark.parametrize("damage", DUE)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_a_finite_network_or_names_the_cause(damage: str, name: str) -> None:
    inputs = inputs_for(damage)
    due, message = DUE[damage].get(name, (None, ""))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", CoinWarning)
        if due is not None and issubclass(due, CoinError):
            with pytest.raises(due, match=message) as caught:
                METHODS[name].merge(inputs, WEIGHTS)
            assert "\n" not in str(caught.value)
            return
        merged = METHODS[name].merge(inputs, WEIGHTS)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.values())
    said = [str(each.message) for each in told if issubclass(each.category, CoinWarning)]
    if due is None:
        assert said == []
    else:
        with pytest.warns(due, match=message):
            warnings.warn(said[0], CoinWarning, stacklevel=1)


@pytest.mark.parametrize("width", [8, 64, 128])
def test_a_gram_matrix_that_rounding_hides_is_singular_all_the_same(width: int) -> None:
    """One sample short of full rank, Cholesky's last pivot is rounding noise, positive as often as not."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        data = torch.randn(width - 1, width, generator=generator, dtype=torch.float64)
        experts = [{"w.weight": torch.randn(3, width, generator=generator, dtype=torch.float64)} for _ in range(2)]
        inputs = MergeInputs(experts, grams=[{"w.weight": (data.T @ data)[None]}] * 2)
        with pytest.raises(NumericalError, match="singular"):
            RegMean(alpha=1, damping=0).merge(inputs, (0.5, 0.5))
        assert torch.isfinite(RegMean().merge(inputs, (0.5, 0.5))["w.weight"]).all()
