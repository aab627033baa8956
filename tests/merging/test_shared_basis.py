"""Adapters whose corrections share a basis: what they keep, their bytes, their files and what is refused."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import coin
from coin.errors import ConfigurationError, StateError
from coin.merging.corrections import Lacking, Moments, SharedBasis
from coin.networks import NetworkConfig, build_network, load_network, save_network
from coin.networks.adapted import answering, stored_nbytes, with_adapters
from coin.networks.adapter import adapters_nbytes
from coin.networks.running import features_and_logits

OUTPUTS, INPUTS, RANK = 24, 40, 3


def experts_in_a_basis(count=6, samples=200):
    """Return a body, experts whose first layers differ from its in one basis of three directions, and inputs."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.Tanh(), nn.Linear(OUTPUTS, 4)).eval()
    left, right = torch.randn(OUTPUTS, RANK), torch.randn(RANK, INPUTS) / INPUTS**0.5
    experts = []
    for _ in range(count):
        expert = deepcopy(body)
        expert[0].weight.data += left @ torch.randn(RANK, RANK) @ right
        experts.append(expert)
    return body, experts, [[torch.randn(samples, INPUTS)] for _ in experts]


def error(adapted, experts, inputs):
    """Return the mean relative error of the features."""
    errors = []
    for place, (expert, (batch,)) in enumerate(zip(experts, inputs, strict=True)):
        own, _ = features_and_logits(expert, batch)
        with answering([adapted], place), torch.no_grad():
            found, _ = features_and_logits(adapted, batch)
        errors.append(float((found - own).norm() / own.norm()))
    return sum(errors) / len(errors)


def test_experts_in_one_basis_are_kept_in_fewer_bytes_than_by_corrections_of_their_own():
    body, experts, inputs = experts_in_a_basis()
    shared = coin.fit_adapters(body, experts, inputs, rank=2 * RANK, shared=True)
    apart = coin.fit_adapters(body, experts, inputs, rank=RANK)
    none = coin.fit_adapters(body, experts, inputs, rank=0)
    assert adapters_nbytes(shared.adapters) < 0.8 * adapters_nbytes(apart.adapters)
    assert error(shared, experts, inputs) < 0.35 * error(none, experts, inputs)
    assert error(shared, experts, inputs) < 1.5 * error(apart, experts, inputs)


def test_basis_and_cores_leave_what_the_joint_fit_leaves():
    torch.manual_seed(1)
    parts = []
    for _ in range(4):
        inputs = torch.randn(1, 60, INPUTS).double() * torch.rand(INPUTS).double()
        moments = Moments(inputs, torch.randn(60, 1, OUTPUTS), torch.ones(60, 1), intercept=False)
        parts.append(Lacking(torch.randn(INPUTS, OUTPUTS).double(), torch.tensor(0.1).double(), moments))
    lost = []
    for rank in (2, 8, OUTPUTS):
        basis = SharedBasis(rank)
        for place, part in enumerate(parts):
            basis.add(place, part)
        basis.fit()
        left = 0.0
        for place, part in enumerate(parts):
            factors = basis.of_expert(place, part.moments)
            assert factors.outer.codes.shape == (rank, OUTPUTS)
            assert factors.inner.codes.shape == (rank, INPUTS)
            rest = part._replace(columns=part.columns - factors.map(part.columns))
            identity = torch.eye(OUTPUTS).double()
            left += float(rest.squared(identity).trace() / part.squared(identity).trace())
        lost.append(left / len(parts))
    assert lost[0] > lost[1] > lost[2]
    assert lost[0] < 1
    assert lost[2] < 0.5  # not all: the right side keeps 24 of 40 directions


def test_a_file_has_the_basis_once_and_all_forms_answer_alike(tmp_path):
    config = NetworkConfig("small_resnet", 16, None, {"width": 4})
    torch.manual_seed(0)
    experts = [build_network(config, 3, seed=0).eval() for _ in range(3)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data += 0.1 * parameter.std().nan_to_num(0.1) * torch.randn_like(parameter)
    inputs = [[torch.randn(40, 3, 16, 16)] for _ in experts]
    batch, who = torch.randn(6, 3, 16, 16), torch.tensor([2, 0, 1, 1, 0, 2])
    method = coin.Refit(adapters={"rank": 4, "shared": True}, compress={"bits": 4, "base_bits": 0})
    made = coin.merge_networks(method, experts, coin.uniform(3), calibration=inputs)
    (packed,) = made.compressed["refit+shared4-4bit"]
    whole = coin.Adapted(packed.network(), packed.adapters)
    plain = torch.cat([whole.network(int(place))(image[None]) for place, image in zip(who, batch, strict=True)])
    packed.save(tmp_path / "packed.safetensors")
    read = coin.Compressed.load(tmp_path / "packed.safetensors", experts[0])
    assert read.nbytes == packed.nbytes
    system = coin.Coded(coin.uniform(3), experts, [packed])
    system.save(tmp_path / "system.safetensors")
    again = coin.Coded.load(tmp_path / "system.safetensors", experts)
    one = method.coded_model(coin.Experts(experts, calibration=inputs), [1 / 3] * 3)
    save_network(tmp_path / "body.safetensors", one.network, config, 3, {}, one.adapters)
    file = load_network(tmp_path / "body.safetensors")
    body = with_adapters(file.network, file.adapters)
    assert file.nbytes == stored_nbytes(made[0]) == stored_nbytes(body)
    forms = [whole, with_adapters(read.network(), read.adapters), system.coded[0], again.coded[0]]
    with answering([*forms, made[0], body], who), torch.no_grad():
        for form in forms:
            torch.testing.assert_close(form(batch), plain, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(body(batch), made[0](batch), rtol=1e-5, atol=1e-6)


def test_memory_decides_the_rank_and_the_bytes_are_those_promised():
    body, experts, inputs = experts_in_a_basis()
    four = adapters_nbytes(coin.fit_adapters(body, experts, inputs, rank=4, shared=True).adapters)
    given = coin.fit_adapters(body, experts, inputs, memory_mib=four / 2**20, shared=True)
    assert adapters_nbytes(given.adapters) == four


def test_an_expert_without_a_share_has_no_core():
    _, experts, inputs = experts_in_a_basis(count=3)
    code = [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    method = coin.Average(adapters={"rank": 2, "shared": True})
    made = coin.merge_networks(method, experts, code, calibration=inputs)
    assert not made[0].adapters[2].tensors
    assert all(change.core is not None for name, change in made[0].adapters[0].changes.items() if name == "0.weight")


def test_several_bases_and_a_basis_without_scales_are_refused():
    body, experts, inputs = experts_in_a_basis(count=2)
    adapters = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        parts = {"left": torch.randn(OUTPUTS, 2), "right": torch.randn(2, INPUTS), "core": torch.randn(2, 2)}
        adapters.append(coin.Adapter({"0.weight": parts}))
    with pytest.raises(StateError, match="found experts with several 'left' beside their cores, expected one"):
        coin.Adapted(body, adapters)
    with pytest.raises(ConfigurationError, match="found shared adapters without scales"):
        coin.fit_adapters(body, experts, inputs, rank=2, shared=True, scales=False)
    with pytest.raises(ConfigurationError, match="found rank=0"):
        coin.fit_adapters(body, experts, inputs, rank=0, shared=True)
