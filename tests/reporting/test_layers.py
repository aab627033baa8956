import math

import pytest
import torch

from coin.errors import StateError
from coin.networks import NetworkConfig, build_network
from coin.reporting.layers import fisher_shares, layers_of, relative_distances


def states(count: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(3, 2, generator=draw) for name in ("b.weight", "a.weight", "a.bias")} for _ in range(count)
    ]


def test_layers_are_the_modules_with_parameters_in_the_networks_order(small_config: NetworkConfig):
    network = build_network(small_config, 3)
    layers = layers_of(name for name, _ in network.named_parameters())
    assert next(iter(layers)) == "stem.0"
    assert list(layers)[-1] == "fc"
    assert layers["fc"] == ["fc.weight", "fc.bias"]
    assert sum(map(len, layers.values())) == len(list(network.parameters()))
    assert layers_of(["scale", "b.weight", "scale"]) == {"scale": ["scale", "scale"], "b": ["b.weight"]}


def test_shares_are_of_the_weighted_mass():
    one = {"b.weight": torch.tensor([1.0, 3.0]), "a.weight": torch.tensor([0.0]), "a.bias": torch.tensor([4.0])}
    # Another head: of two outputs rather than one.
    two = {"b.weight": torch.tensor([2.0, 2.0]), "a.weight": torch.tensor([5.0, 5.0]), "a.bias": torch.tensor([2.0])}
    shares = fisher_shares([one, two], [0.25, 0.75])
    assert list(shares) == ["b", "a"]
    assert shares["b"] == pytest.approx((0.25 * 4 + 0.75 * 4) / (0.25 * 8 + 0.75 * 16))
    assert sum(shares.values()) == pytest.approx(1)
    nothing = {name: torch.zeros(2) for name in one}
    assert all(math.isnan(share) for share in fisher_shares([nothing], [1.0]).values())


def test_distances_are_relative_to_the_experts_own():
    experts, weights = states(3), [0.5, 0.3, 0.2]
    average = {name: sum(w * e[name] for w, e in zip(weights, experts, strict=True)) for name in experts[0]}
    assert relative_distances(average, experts, weights) == pytest.approx({"b": 0.0, "a": 0.0}, abs=1e-6)
    coded = states(4)[3]
    found = relative_distances(coded, experts, weights)
    for layer, names in layers_of(coded).items():
        squares = [sum(float((coded[n] - e[n]).square().sum()) for n in names) for e in experts]
        spread = [sum(float((average[n] - e[n]).square().sum()) for n in names) for e in experts]
        mean = sum(w * s for w, s in zip(weights, squares, strict=True))
        own = sum(w * s for w, s in zip(weights, spread, strict=True))
        assert mean / own == pytest.approx(1 + found[layer] ** 2, rel=1e-5)  # what the docstring says of the experts
    # With equal weights two experts are as far from their average as they are on the average: at 1.
    assert relative_distances(experts[0], experts[:2], [0.5, 0.5]) == pytest.approx({"b": 1.0, "a": 1.0})


def test_where_experts_agree_there_is_no_distance():
    first, second = states(2)
    second["b.weight"] = first["b.weight"] * (1 + 1e-8)
    found = relative_distances(second, [first, second], [0.4, 0.6])
    assert math.isnan(found["b"])
    assert found["a"] > 0


def test_other_names_are_refused():
    first, second = states(2)
    del second["a.bias"]
    with pytest.raises(StateError, match=r"expert 0 has a tensor 'a\.bias'"):
        relative_distances(second, [first, first], [0.5, 0.5])
