from copy import deepcopy

import pytest
import torch
from torch import nn

from coin.coding import Code
from coin.errors import ConfigurationError, StateError
from coin.merging import Average, Coin, FullFisher, GaussNewton, HeadFit, TaskArithmetic
from coin.merging.networks import merge_networks
from coin.networks import BatchNormPolicy, build_network, recalibrate
from coin.statistics import fisher_diagonal

ROW = [0.25, 0.75]
CODE = Code([ROW])


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
    (merged,) = merge_networks(Average(), experts, CODE)
    for name, tensor in merged.state_dict().items():
        first, second = (expert.state_dict()[name] for expert in experts)
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.25 * first + 0.75 * second, rtol=1e-14, atol=1e-14)
        else:
            assert tensor.item() == 2
    assert not merged.training
    assert all(same(expert.state_dict(), state) for expert, state in zip(experts, before, strict=True))


def test_every_row_of_the_code_gives_a_network_of_its_own(make_expert):
    experts = [make_expert(1), make_expert(2)]
    merged = merge_networks(Average(), experts, Code([ROW, [0.5, 0.5]]))
    assert len(merged) == 2
    assert same(merged[0].state_dict(), merge_networks(Average(), experts, CODE)[0].state_dict())
    assert same(merged[1].state_dict(), merge_networks(Average(), experts, Code([[0.5, 0.5]]))[0].state_dict())
    with torch.no_grad():
        merged[0].fc.weight.zero_()
    assert all(bool(network.fc.weight.any()) for network in [merged[1], *experts])


def test_permuting_experts_with_their_weights_changes_nothing(make_expert, batches):
    experts = [make_expert(1), make_expert(2)]
    fishers = [fisher_diagonal(expert, batches) for expert in experts]
    (merged,) = merge_networks(Coin(), experts, CODE, fishers=fishers)
    (swapped,) = merge_networks(Coin(), experts[::-1], Code([ROW[::-1]]), fishers=fishers[::-1])
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(swapped.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [Average, Coin, GaussNewton])
def test_identical_experts_merge_to_a_network_with_their_outputs(make_expert, batches, method):
    expert = make_expert(1)
    fishers = [fisher_diagonal(expert, batches)] * 2
    (merged,) = merge_networks(method(), [expert, deepcopy(expert)], CODE, fishers=fishers, batches=batches)
    with torch.no_grad():
        torch.testing.assert_close(merged(batches[0]), expert(batches[0]), rtol=1e-9, atol=1e-9)


def test_an_average_of_linear_networks_answers_the_encoded_outputs(batches):
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(768, 4)).double() for _ in range(2)]
    (merged,) = merge_networks(Average(), experts, CODE)
    inputs = batches[0]
    wanted = CODE.encode(torch.stack([expert(inputs) for expert in experts]))[0]
    torch.testing.assert_close(merged(inputs), wanted, rtol=1e-12, atol=1e-12)


def test_keep_takes_the_shared_initialisations_statistics(make_expert):
    experts, initial = [make_expert(1), make_expert(2)], make_expert(3)
    method = Average(batchnorm=BatchNormPolicy.keep)
    (merged,) = merge_networks(method, experts, CODE, initial=initial)
    assert same(dict(merged.named_buffers()), dict(initial.named_buffers()))
    averaged = dict(merge_networks(Average(), experts, CODE)[0].named_parameters())
    assert same(dict(merged.named_parameters()), averaged)
    with pytest.raises(ConfigurationError, match="no shared initialisation, whose BatchNorm statistics 'average'"):
        merge_networks(method, experts, CODE)


def test_recalibrate_estimates_anew_in_the_merged_network(make_expert, batches):
    experts = [make_expert(1), make_expert(2)]
    method = Average(batchnorm=BatchNormPolicy.recalibrate, label="anew")
    (merged,) = merge_networks(method, experts, CODE, batches=batches)
    (wanted,) = merge_networks(Average(), experts, CODE)
    recalibrate(wanted, batches)
    assert same(merged.state_dict(), wanted.state_dict())
    with pytest.raises(ConfigurationError, match="no calibration inputs, which method 'anew' needs"):
        merge_networks(method, experts, CODE)


def test_a_policy_asks_for_nothing_where_there_is_no_batchnorm():
    experts = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for policy in BatchNormPolicy:
        (merged,) = merge_networks(Average(batchnorm=policy), experts, CODE)
        assert isinstance(merged, nn.Linear)


def test_experts_in_train_mode_are_left_as_found_and_merge_the_same(make_expert, batches):
    experts = [make_expert(1), make_expert(2)]
    fishers = [fisher_diagonal(expert, batches) for expert in experts]
    method = GaussNewton(max_steps=1, max_iterations=2)
    (wanted,) = merge_networks(method, experts, CODE, fishers=fishers, batches=batches)
    training = [deepcopy(expert).train() for expert in experts]
    (merged,) = merge_networks(method, training, CODE, fishers=fishers, batches=batches)
    assert same(merged.state_dict(), wanted.state_dict())
    for expert, original in zip(training, experts, strict=True):
        assert same(expert.state_dict(), original.state_dict())
        assert all(module.training for module in expert.modules())


def test_what_a_method_needs_is_named(make_expert, batches):
    experts = [make_expert(1), make_expert(2)]
    with pytest.raises(ConfigurationError, match="method 'coin' needs 'fisher', which was not given; give it"):
        merge_networks(Coin(), experts, CODE)
    with pytest.raises(ConfigurationError, match="needs 'initial'"):
        merge_networks(TaskArithmetic(), experts, CODE)
    with pytest.raises(ConfigurationError, match="no calibration inputs, which method 'gauss_newton' needs"):
        merge_networks(GaussNewton(), experts, CODE, fishers=[fisher_diagonal(e, batches) for e in experts])


def test_experts_that_do_not_fit_are_refused_by_tensor(make_expert, small_config):
    with pytest.raises(StateError, match=r"tensor 'fc\.weight' is \[4, 32\] in expert 1 but \[3, 32\] in expert 0"):
        merge_networks(Average(), [make_expert(1), build_network(small_config, 4).double()], CODE)
    broken = make_expert(2)
    with torch.no_grad():
        broken.fc.bias[0] = float("nan")
    with pytest.raises(StateError, match=r"expert 1 is not finite: tensor 'fc\.bias'"):
        merge_networks(Average(), [make_expert(1), broken], CODE)


def test_full_fisher_takes_each_experts_own_inputs(make_expert, batches):
    experts = [make_expert(1), make_expert(2)]
    fishers = [fisher_diagonal(expert, batches) for expert in experts]
    method = FullFisher(max_iterations=3, tolerance=0.9)
    with pytest.raises(ConfigurationError, match="give own_batches, one entry for each of the 2 experts"):
        merge_networks(method, experts, CODE, fishers=fishers)
    own = [iter(batches), (batch + 1 for batch in batches)]
    (merged,) = merge_networks(method, experts, CODE, fishers=fishers, own_batches=own)
    (averaged,) = merge_networks(Average(), experts, CODE)
    parts = zip(merged.parameters(), averaged.parameters(), strict=True)
    assert any(not torch.allclose(first, second, rtol=1e-3) for first, second in parts)


def test_calibration_inputs_take_the_networks_type(make_expert, batches):
    experts = [make_expert(1), make_expert(2)]
    rounded = [batch.float() for batch in batches]
    method = HeadFit(batchnorm=BatchNormPolicy.recalibrate)
    (found,) = merge_networks(method, experts, CODE, batches=rounded)
    (wanted,) = merge_networks(method, experts, CODE, batches=[batch.double() for batch in rounded])
    assert same(found.state_dict(), wanted.state_dict())
