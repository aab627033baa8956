"""Every merge method and every decoder on a small network of every family: right, or refused in one line."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from builders import FAMILIES, SECOND, Case
from closeness import check_equal

import coin
from coin.core.batches import take
from coin.errors import CoinError
from coin.networks.calling import logits_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROW = [0.4, 0.6]
# Which policy is better is tried once a family, by the first method.
KEPT = {"batchnorm": "average"}
METHODS = {
    "average": coin.Average(),
    "coin": coin.Coin(fisher_data="own", **KEPT),
    "regmean_linear": coin.RegMean("linear", gram_data="own", **KEPT),
    "regmean_all": coin.RegMean("all", gram_data="own", **KEPT),
    "head_fit": coin.HeadFit(**KEPT),
    "refit": coin.Refit(),
    "distillation": coin.Distillation(lr=1e-5, steps=2, start="average"),
}
SWAPPED = ("average", "regmean_all", "refit")  # one a way to depend on the order, to save time
TWINS = ("coin", "regmean_all", "head_fit", "refit")
HEAD = ("head_fit", "refit")
READ_FEATURES = (*HEAD, "feature_ridge")
ONE_ROW = dict.fromkeys(READ_FEATURES, "expected one row a sample")
TWO_HEADS = dict.fromkeys(HEAD, "are not its head")
# What is refused for whom: family → method or decoder → a part of the line.
REFUSED = {
    "timm/resnetv2": dict.fromkeys(READ_FEATURES, "found no Linear layer"),  # it is a convolution
    "timm/volo": TWO_HEADS,
    "timm/crossvit": TWO_HEADS,
    "timm/efficientformer": TWO_HEADS,
    "hugging_face/swiftformer": TWO_HEADS,
    "hugging_face/opt": ONE_ROW,
    "hugging_face/llama": ONE_ROW,
    "hugging_face/mixtral": ONE_ROW,
}
assert REFUSED.keys() <= FAMILIES.keys()


def refused(family, name):
    """Run a block that raises what is expected of a family with a method or a decoder, if that is refused."""
    line = REFUSED.get(family, {}).get(name)
    if line is None:
        return nullcontext()
    return pytest.raises(CoinError, match=rf"\A[^\n]*{line}[^\n]*\Z")


def check_close(found, expected, tolerance):
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * float(expected.abs().max())
    )


def check_as_found(case, before):
    for expert, own in zip(case.experts, before, strict=True):
        check_equal(expert, own)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fisher_is_the_slow_reference(family):
    case = Case(family)
    network = case.experts[0]
    batch = case.tasks[0][1]
    plain = deepcopy(network)
    before = case.answers(network)  # what a network keeps from a pass must not hide anything
    found = coin.fisher_diagonal(network, [batch])
    parameters = {name: each for name, each in plain.named_parameters() if each.requires_grad}
    expected = {name: torch.zeros_like(each) for name, each in parameters.items()}
    for place in range(SECOND):
        # Of two: PyTorch's own backward errs for batches of one.
        pair = take(batch, torch.tensor([place, place]))
        for logit in logits_of(plain, pair)[0]:
            gradients = torch.autograd.grad(
                logit,
                list(parameters.values()),
                retain_graph=True,
                materialize_grads=True,
                allow_unused=True,
            )
            for total, gradient in zip(expected.values(), gradients, strict=True):
                total += gradient.square() / SECOND
    largest = max(float(each.max()) for each in expected.values())
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        tolerance = 1e-6 * float(each.max()) + 1e-14 * largest
        torch.testing.assert_close(found[name], each, rtol=0, atol=tolerance)
    assert torch.equal(case.answers(network), before)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_is_right_or_refused(family, name):
    """Finite; the same in any order of the experts; identical experts to themselves; the experts are left as found."""
    case = Case(family)
    first, second = case.experts
    before = deepcopy(case.experts)
    own = case.answers(first)

    def merged(networks, tasks, row):
        experts = coin.Experts(networks, calibration=tasks, initial=case.initial)
        return case.answers(METHODS[name].coded_model(experts, row).network)

    with refused(family, name):
        found = merged([first, second], case.tasks, ROW)
        assert found.shape == own.shape
        assert found.isfinite().all()
        if name in SWAPPED:
            check_close(merged([second, first], case.tasks[::-1], ROW[::-1]), found, 1e-6)
        if name in TWINS:
            few = [[take(task[0], slice(0, 3))] for task in case.tasks]
            check_close(merged([first, deepcopy(first)], few, ROW), own, 1e-6)
    check_as_found(case, before)
    assert torch.equal(case.answers(first), own)


@pytest.mark.parametrize("decoder", ["linear", "ridge", "feature_ridge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoder_is_right_or_refused(family, decoder):
    case = Case(family)
    before = deepcopy(case.experts)
    coded = coin.merge_networks(coin.Average(**KEPT), case.experts, [ROW])
    system = coin.Coded([ROW], case.experts, coded)
    with refused(family, decoder):
        system.fit_decoder(case.batches, [0], decoder)
        (decoded,) = torch.cat([system.decode(batch) for batch in case.batches], dim=1)
        assert decoded.isfinite().all()
        if decoder == "linear":
            by_hand = case.answers(coded[0]) - ROW[1] * case.answers(case.experts[1])
            check_close(decoded, by_hand / ROW[0], 1e-9)
        else:
            score = system.score(decoded[None])
            assert ((score >= 0) & (score <= 1)).all()
    check_as_found(case, before)
