from copy import deepcopy

import pytest
import torch
from torch import nn

from coin.coding import Code
from coin.errors import ConfigurationError
from coin.merging import Average, Coin, Refit, merge_networks
from coin.networks import BatchNormPolicy, build_network, recalibrate
from coin.statistics import fisher_diagonal

ROW = [0.25, 0.75]
CODE = Code([ROW])
AVERAGE = Average(batchnorm="average")


@pytest.fixture
def batches():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 16, 16, generator=draw, dtype=torch.float64) for _ in range(2)]


@pytest.fixture
def make_expert(small_config, batches):
    def make(seed):
        network = build_network(small_config, 3, seed=seed).double()
        recalibrate(network, [batch + seed for batch in batches])
        return network.eval()

    return make


def same(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items()) and first.keys() == second.keys()


def test_averages_are_of_parameters_and_of_statistics(make_expert):
    experts = [make_expert(1), make_expert(2)]
    before = deepcopy([expert.state_dict() for expert in experts])
    (merged,) = merge_networks(AVERAGE, experts, CODE)
    for name, tensor in merged.state_dict().items():
        first, second = (expert.state_dict()[name] for expert in experts)
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.25 * first + 0.75 * second, rtol=1e-14, atol=1e-14)
        else:
            assert tensor.item() == 2
    assert not merged.training
    assert all(same(expert.state_dict(), state) for expert, state in zip(experts, before, strict=True))


def test_keep_takes_the_shared_initialisations_statistics(make_expert):
    experts, initial = [make_expert(1), make_expert(2)], make_expert(3)
    method = Average(batchnorm=BatchNormPolicy.keep)
    (merged,) = merge_networks(method, experts, CODE, initial=initial)
    assert same(dict(merged.named_buffers()), dict(initial.named_buffers()))
    averaged = dict(merge_networks(AVERAGE, experts, CODE)[0].named_parameters())
    assert same(dict(merged.named_parameters()), averaged)
    with pytest.raises(ConfigurationError, match="no shared initialisation, which the method, its B"):
        merge_networks(method, experts, CODE)
    for wrong in (Coin, "Coin"):
        with pytest.raises(ConfigurationError, match="expected an object of a method's class"):
            merge_networks(wrong, experts, CODE)


def test_a_policy_asks_for_nothing_where_there_is_no_batchnorm():
    experts = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for policy in BatchNormPolicy:
        (merged,) = merge_networks(Average(batchnorm=policy), experts, CODE)
        assert isinstance(merged, nn.Linear)


def test_statistics_that_are_given_are_those_that_would_be_computed(make_expert, batches):
    experts, own = [make_expert(1), make_expert(2)], [batches, [batch.float() + 1 for batch in batches]]
    fishers = [fisher_diagonal(*pair) for pair in zip(experts, own, strict=True)]
    method = Coin(fisher_data="own", batchnorm="average")
    (given,) = merge_networks(method, experts, CODE, fishers=fishers)
    (computed,) = merge_networks(method, experts, CODE, calibration=own)
    assert same(given.state_dict(), computed.state_dict())


@pytest.mark.parametrize("method", [Average, Refit])
@pytest.mark.slow
def test_compressed_coded_models_stand_beside_the_whole_ones(make_expert, batches, method):
    experts, initial = [make_expert(1), make_expert(2)], make_expert(0)
    given = {"calibration": [[batch] for batch in batches]}
    options = {"target": "own"} if method is Refit else {"batchnorm": "average"}
    hows = [{"bits": 8}, {"bits": 8, "base_bits": 8}, {"bits": 2, "base_bits": 0}]
    with pytest.raises(ConfigurationError, match=r"found no shared initialisation, which .* or its compression needs"):
        merge_networks(method(**options, compress=hows), experts, CODE, **given)
    whole = merge_networks(method(**options), experts, CODE, **given)
    assert whole.compressed == [{}]
    merged = merge_networks(
        method(**options, compress=hows), experts, Code([ROW, [0.5, 0.5]]), initial=initial, **given
    )
    assert same(merged[0].state_dict(), whole[0].state_dict())
    names = [f"{method.name}-{end}" for end in ("8bit", "8bit-int8base", "2bit-nobase")]
    assert [list(each) for each in merged.compressed] == [names, names]
    x = torch.cat(batches)
    with torch.no_grad():
        for network, compressed in zip(merged, merged.compressed, strict=True):
            answers = network(x)
            for name in names[:2]:
                assert (compressed[name].network()(x) - answers).norm() < 0.1 * answers.norm()
    assert merged.compressed[0][names[2]].nbytes < merged.compressed[0][names[0]].nbytes / 2
