"""Networks that are called in the user's own way, with batches of anything made of tensors."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from coin.coding import Code
from coin.errors import DataError
from coin.merging import Average, Coin, Experts, HeadFit, Refit, RegMean, merge_networks
from coin.modules import Coded
from coin.networks import recalibrate
from coin.statistics import fisher_diagonal, gram_sums

CODE = Code([[0.4, 0.6]])


class Texts(nn.Module):
    """A small network that is called as Hugging Face's are."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        words = self.words(input_ids) * attention_mask[..., None]
        hidden = self.norm(torch.tanh(self.inner(words.sum(1) / attention_mask.sum(1, keepdim=True))))
        return SimpleNamespace(logits=self.classifier(hidden))


class Stacked(Texts):
    """The same network of one tensor: tokens and mask ``[B, 2, T]``."""

    def forward(self, inputs):
        return super().forward(*inputs.unbind(1)).logits


def call(network, batch):
    return network(**batch).logits


def named(batch):
    return dict(zip(("input_ids", "attention_mask"), batch.unbind(1), strict=True))


def stacked_batches(seed):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (14, 5), generator=draw)
    lengths = torch.randint(1, 6, (14, 1), generator=draw)
    whole = torch.stack([tokens, (torch.arange(5) < lengths).long()], 1)
    return list(whole.split(5))


def networks(kind):
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(kind().double().eval())
        made[-1].norm.running_mean += 0.1 * seed
    return made


STACKED = [stacked_batches(seed) for seed in (5, 6)]
NAMED = [[named(batch) for batch in batches] for batches in STACKED]
METHODS = [Average(batchnorm="recalibrate"), Coin(), RegMean(alpha=None, damping=None), HeadFit(), Refit("both")]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_batches_by_name_merge_as_one_tensor_does(method):
    (expected,) = merge_networks(method, networks(Stacked), CODE, calibration=STACKED)
    (found,) = merge_networks(method, networks(Texts), CODE, calibration=NAMED, forward=call)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert type(found) is Texts
    assert vars(found).keys() == vars(Texts()).keys()
    assert torch.equal(call(found, NAMED[0][0]), expected(STACKED[0][0]))


def test_statistics_and_recalibration_read_batches_by_name():
    plain, own = networks(Stacked)[0], networks(Texts)[0]
    for statistic in (
        fisher_diagonal,
        lambda *given, **options: fisher_diagonal(*given, memory_mib=1, **options),
        lambda *given, **options: fisher_diagonal(*given, kind="empirical", labels=torch.arange(14) % 3, **options),
        lambda *given, **options: gram_sums(*given, **options).mean(),
    ):
        expected, found = statistic(plain, STACKED[0]), statistic(own, NAMED[0], forward=call)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert recalibrate(plain, STACKED[0]) == recalibrate(own, NAMED[0], forward=call) == 14
    assert torch.equal(plain.norm.running_var, own.norm.running_var)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"a": torch.zeros(2, 3), "text": ["a", "b"]}, r"found a batch of \{'a': 2, 'text': 'list'\}, expected tens"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(3)}, r"of \{'a': 2, 'b': 3\}, expected tensors .* of as many"),
        ((torch.zeros(2, 3), torch.zeros(2)), "found a batch of type tuple, expected a tensor .*, or ten"),
    ],
)
def test_batches_of_anything_else_are_told(batch, message):
    network = networks(Texts)[0]
    for use in (
        lambda: fisher_diagonal(network, [batch], forward=call),
        lambda: gram_sums(network, [batch], forward=call),
        lambda: recalibrate(network, [batch], forward=call),
        lambda: Experts([network], calibration=[[batch]], forward=call),
        lambda: Coded(Code([[1.0]]), [network], [network], forward=call)(batch),
    ):
        with pytest.raises(DataError, match=message) as told:
            use()
        assert "\n" not in str(told.value)
    with pytest.raises(DataError, match=r"type dict, expected input tensors .* give forward=lambda network, batch"):
        fisher_diagonal(network, NAMED[0])
