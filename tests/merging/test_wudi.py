"""Wudi against an explicit minimiser, what it leaves to the average; the base itself."""

import pytest
import torch
from torch import nn

import coin
from coin.errors import ConfigurationError
from coin.statistics.gram import linear_maps

ROW = (0.2, 0.3, 0.5)
CODE = coin.Code([ROW])


class Mixed(nn.Module):
    """One layer of every kind."""

    head_name = "head"

    def __init__(self):
        super().__init__()
        self.first, self.deep, self.turned = (
            nn.Conv2d(3, 4, 2),
            nn.Conv2d(4, 4, 1, groups=4),
            nn.ConvTranspose2d(4, 5, 1),
        )
        self.norm, self.words, self.place = nn.BatchNorm2d(5), nn.Embedding(7, 5), nn.Parameter(torch.randn(1, 3, 5))
        self.frozen, self.head = nn.Linear(5, 5), nn.Linear(5, 6)
        self.tied = nn.Linear(5, 7)
        self.tied.weight = self.words.weight

    def forward(self, x):
        x = self.norm(self.turned(self.deep(self.first(x)))).mean((2, 3))
        return self.head((x + self.tied(x) @ self.words.weight + self.place.mean((0, 1))).tanh() + self.frozen(x))


def networks():
    torch.manual_seed(0)
    initial = Mixed().double().eval()
    experts = [coin.core.batches.clone(initial) for _ in ROW]
    for index, expert in enumerate(experts):
        draw = torch.Generator().manual_seed(index)
        for name, parameter in expert.named_parameters():
            if name != "frozen.weight" or index:  # the first has left it as it was
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return initial, experts


@pytest.mark.parametrize("head", [False, True])
def test_it_minimises_the_interference_of_the_task_vectors_and_averages_what_is_no_map(head):
    initial, experts = networks()
    (made,) = coin.merge_networks(coin.Wudi(head=head), experts, CODE, initial=initial)
    for name, found in made.named_parameters():
        own, start = [expert.get_parameter(name) for expert in experts], initial.get_parameter(name)
        average = sum(share * each for share, each in zip(ROW, own, strict=True))
        if name not in ("first.weight", *["head.weight"] * head):
            torch.testing.assert_close(found, average, rtol=1e-12, atol=1e-12, msg=name)
            continue
        steps = [(each - start).flatten(1) for each in own]
        # Σ_i β_i ‖(W − W_i) τ_iᵀ‖² / ‖τ_i‖² + λ ‖W − W̄‖² as one least-squares problem, a row of W an unknown vector.
        rows = [(share**0.5 / step.norm()) * step for share, step in zip(ROW, steps, strict=True)]
        width = steps[0].shape[1]
        damping = (1e-4 * sum(float(each.square().sum()) for each in rows) / width) ** 0.5
        left = torch.cat([*rows, damping * torch.eye(width, dtype=torch.float64)])
        right = [each @ weight.flatten(1).T for each, weight in zip(rows, own, strict=True)]
        expected = torch.linalg.lstsq(left, torch.cat([*right, damping * average.flatten(1).T])).solution.T
        torch.testing.assert_close(found.flatten(1), expected, rtol=1e-9, atol=1e-10, msg=name)
        assert (found - average).norm() > 0.1 * steps[0].norm()


def test_orthogonal_task_vectors_are_all_kept_whole():
    """No expert's inputs, as its task vector tells of them, meet another's task vector: nothing interferes."""
    initial = nn.Linear(4, 3).double()
    experts = [coin.core.batches.clone(initial) for _ in range(2)]
    with torch.no_grad():
        for place, expert in enumerate(experts):
            expert.weight[:, 2 * place : 2 * place + 2] += torch.randn(3, 2, dtype=torch.float64)
    (made,) = coin.merge_networks(coin.Wudi(head=True), experts, coin.uniform(2), initial=initial)
    wanted = experts[0].weight + experts[1].weight - initial.weight
    torch.testing.assert_close(made.weight, wanted, rtol=0.01, atol=0.01)


class Conv1D(nn.Module):
    """As Hugging Face's: x ↦ x W."""

    head_name = ""  # the network itself

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight


def test_a_weight_that_lies_the_other_way_round_gives_the_same():
    initial, plain = Conv1D(), nn.Linear(4, 6, bias=False).double()
    experts = [Conv1D() for _ in ROW]
    (turned,) = coin.merge_networks(coin.Wudi(head=True), experts, CODE, initial=initial)
    linear = [coin.core.batches.clone(plain) for _ in ROW]
    for one, two in zip([plain, *linear], [initial, *experts], strict=True):
        one.weight.data = two.weight.data.T
    (made,) = coin.merge_networks(coin.Wudi(head=True), linear, CODE, initial=plain)
    torch.testing.assert_close(turned.weight.T, made.weight, rtol=1e-10, atol=1e-12)
    assert linear_maps(initial) == ["weight:T"]


def test_maps_are_found_by_their_modules():
    encoder = nn.TransformerEncoderLayer(4, 2, 8)
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert linear_maps(encoder) == names
    assert linear_maps(Mixed()) == ["first.weight", "frozen.weight", "head.weight"]
    assert linear_maps(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) == []  # no parameter of its own


def test_the_base_is_the_initialisation_with_buffers_by_the_policy():
    initial, experts = networks()
    for index, each in enumerate([initial, *experts]):
        each.norm.running_mean.fill_(float(index))
    for policy, mean in (("keep", 0.0), ("average", 0.2 * 1 + 0.3 * 2 + 0.5 * 3)):
        (made,) = coin.merge_networks(coin.Base(batchnorm=policy), experts, CODE, initial=initial)
        torch.testing.assert_close(made.norm.running_mean, torch.full((5,), mean, dtype=torch.float64))
        assert all(torch.equal(made.get_parameter(name), value) for name, value in initial.named_parameters())


@pytest.mark.parametrize("method", [coin.Base(), coin.Wudi(), coin.Refit(start="wudi")], ids=lambda each: each.label)
def test_they_want_the_initialisation(method):
    with pytest.raises(ConfigurationError, match="found no shared initialisation"):
        coin.merge_networks(method, networks()[1], CODE, calibration=[[torch.randn(9, 3, 4, 4).double()]] * 3)
