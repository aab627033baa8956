"""Which layers Refit may fit row by row: those whose rows lie sample by sample, in every network alike."""

from contextlib import contextmanager

import pytest
import torch
from hostile import CLASSES, batches, moved
from torch import nn

import coin
from coin.errors import CoinWarning
from coin.merging import Experts


class Arranged(nn.Module):
    """Tokens [B, T, 4] through two layers, in rows that lie sample by sample or otherwise."""

    def __init__(self, arrange):
        super().__init__()
        self.score, self.first = nn.Linear(4, 1), nn.Linear(4, 6)
        self.second, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.arrange = arrange

    def forward(self, x):
        rows, back = self.arrange(x, self.score)
        return self.head(back(self.second(self.first(rows).tanh()).tanh()).mean(1))


def by_sample(x, score):
    return x.flatten(0, 1), lambda rows: rows.view(len(x), -1, rows.shape[1])


def by_time(x, score):
    return x.transpose(0, 1).flatten(0, 1), lambda rows: rows.view(-1, len(x), rows.shape[1]).transpose(0, 1)


def by_score(x, score):
    order = score(x).argsort(1)  # of an expert's own: in another network the rows lie otherwise
    return torch.gather(x, 1, order.expand(x.shape)).flatten(0, 1), lambda rows: rows.view(len(x), -1, rows.shape[1])


def by_detached_score(x, score):
    with torch.no_grad():
        order = score(x).detach().argsort(1)
    return torch.gather(x, 1, order.expand(x.shape)).flatten(0, 1), lambda rows: rows.view(len(x), -1, rows.shape[1])


@pytest.mark.parametrize("arrange", [by_sample, by_time, by_score, by_detached_score])
def test_refit_leaves_rows_alone_that_are_not_of_the_sample_that_it_takes_them_for(arrange):
    """One function in three layouts: it took row r for sample r // k and looked at shapes alone."""
    torch.manual_seed(0)
    network = Arranged(arrange).double()
    experts, calibration = [moved(network, 1, 0.3), moved(network, 2, 0.3)], batches(3, 4)
    x, residuals = torch.cat([batch for task in calibration for batch in task]), {}
    for method in (coin.Average(), coin.Refit("both", head=False)):
        made = method.make(Experts(experts, calibration=calibration), [0.5, 0.5])
        residuals[method.label] = float((made.network(x) - sum(expert(x) for expert in experts) / 2).norm())
    rows = {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert rows & set(made.chosen["averaged"]) == (set() if arrange is by_sample else rows)
    assert residuals["refit"] < residuals["average"]


class Unbatched(torch.autograd.Function):
    """The identity, whose backward pass goes through NumPy and so takes no batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.detach().numpy().copy())


def test_refit_of_networks_whose_backward_pass_cannot_be_batched():
    class Through(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](Unbatched.apply(self[0](x))))

    torch.manual_seed(0)
    network = Through(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    experts = [moved(network, 1, 0.3), moved(network, 2, 0.3)]
    made = coin.merge_networks(coin.Refit("both"), experts, coin.Code([[0.5, 0.5]]), calibration=batches(4))
    assert made.chosen[0]["averaged"] == []


@pytest.mark.parametrize("groups", [1, 2])
def test_the_progress_is_of_all_passes_of_the_experts_and_of_the_fits(groups, monkeypatch):
    told = []

    @contextmanager
    def progress(what, total):
        done = []
        yield done.append
        told.append((what, total, sum(done)))

    monkeypatch.setattr("coin.merging.refit.progress", progress)
    if groups == 2:  # experts run anew for every layer
        monkeypatch.setattr("coin.merging.refit.FEWEST_MIB", 0)
    network, calibration = (
        nn.Sequential(nn.Linear(4, 6), nn.Linear(6, CLASSES)),
        [[torch.randn(9, 4)] for _ in range(3)],
    )
    experts = Experts([moved(network, seed, 0.3) for seed in range(3)], calibration=calibration)
    coin.Refit("own", head=False, memory_mib=3).make(experts, [0.25, 0.25, 0.5])
    ((what, total, done),) = told
    assert (what, total) == ("refit, layers", groups * 27 + 2 * 27)
    assert done == pytest.approx(total)


def test_a_network_without_a_layer_that_can_be_refitted_is_averaged():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.head(x).tanh())

    experts = Experts([Twice(), Twice()], calibration=[[torch.randn(9, 4)]] * 2)
    with pytest.warns(CoinWarning, match="kept the average"):
        made = coin.Refit("own", head=False).make(experts, [0.5, 0.5])
    assert made.chosen["averaged"] == ["head.bias", "head.weight"]
