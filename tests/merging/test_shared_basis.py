"""Adapters whose corrections share a basis: what they keep, their bytes, their files and what is refused."""

from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from torch import nn

import coin
from coin.errors import ConfigurationError, StateError
from coin.merging import corrections
from coin.merging.corrections import Lacking, Moments, SharedBasis
from coin.networks import NetworkConfig, build_network, load_network, save_network
from coin.networks.adapted import answering, stored_nbytes, with_adapters
from coin.networks.adapter import adapters_nbytes
from coin.networks.kept import Change
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


class Unrounded(NamedTuple):
    """A matrix in place of its rounded form."""

    matrix: torch.Tensor

    def dense(self):
        return self.matrix


def metric_of(part):
    """Return cov(a) + μI of what is lacking."""
    identity = torch.eye(len(part.columns)).double()
    return part.moments.gram()[0] + part.damping * identity


def leading_of(matrix, metric, count):
    """Return the best matrix of low rank in a metric, by the SVD of A R with M = R Rᵀ."""
    root = torch.linalg.cholesky(metric)
    u, s, v = torch.linalg.svd(matrix @ root, full_matrices=False)
    return u[:, :count] * s[:count] @ v[:count] @ torch.linalg.inv(root)


@pytest.mark.parametrize("unknowns", [9, INPUTS])  # fewer than rows below one another, and more
@pytest.mark.parametrize("rank", [1, 4])
def test_basis_and_cores_are_the_joint_singular_vectors_and_the_best_fit_in_each_metric(monkeypatch, unknowns, rank):
    monkeypatch.setattr(corrections, "quantise", lambda matrix, bits: Unrounded(matrix))
    torch.manual_seed(1)
    parts, basis = [], SharedBasis(rank)
    for place, samples in enumerate((5, 20, 60)):
        inputs = torch.randn(1, samples, unknowns).double() * 2 * torch.rand(unknowns).double() + 1
        moments = Moments(inputs, torch.randn(samples, 1, OUTPUTS), torch.ones(samples, 1), intercept=True)
        columns = (1 + 3 * place) * torch.randn(unknowns, OUTPUTS).double()
        parts.append(Lacking(columns, torch.tensor(0.1 + place).double(), moments))
        basis.add(place, parts[-1])
    basis.fit()
    squares = [part.columns.T @ metric_of(part) @ part.columns for part in parts]
    sizes = [float(square.trace()) for square in squares]
    joined = sum(square / size for square, size in zip(squares, sizes, strict=True))
    left = torch.linalg.eigh(joined)[1][:, -rank:]  # U
    rows = torch.cat([left.T @ part.columns.T / size**0.5 for part, size in zip(parts, sizes, strict=True)])
    mean = sum(metric_of(part) / metric_of(part).trace() for part in parts)
    right = torch.linalg.svd(leading_of(rows, mean, rank), full_matrices=False)[2][:rank]  # spans V
    for place, part in enumerate(parts):
        metric = metric_of(part)
        core = (left.T @ part.columns.T @ metric @ right.T) @ torch.linalg.inv(right @ metric @ right.T)
        expected = left @ core @ right
        torch.testing.assert_close(basis.of_expert(place, part.moments).map(part.columns).T, expected)


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
    first, second = adapters
    for several in (adapters, [first, coin.Adapter({"0.weight": {"left": parts["left"], "right": parts["right"]}})]):
        with pytest.raises(StateError, match="found corrections of several bases, expected one for all experts"):
            coin.Adapted(body, several)
    with pytest.raises(StateError, match=r"found several bases of '0\.weight', expected one for all experts"):
        adapters_nbytes(adapters)
    with pytest.raises(StateError, match=r"found a core of shape \[3, 3\], expected \[2, 2\]"):
        coin.Adapter({"0.weight": {**parts, "core": torch.randn(3, 3)}})
    stored = second.changes["0.weight"].tensors
    del stored["left"]
    with pytest.raises(StateError, match="found a change with 'core' and no 'left', expected both"):
        Change(**stored)
    with pytest.raises(ConfigurationError, match="found shared adapters without scales"):
        coin.fit_adapters(body, experts, inputs, rank=2, shared=True, scales=False)
    with pytest.raises(ConfigurationError, match="found rank=0"):
        coin.fit_adapters(body, experts, inputs, rank=0, shared=True)
