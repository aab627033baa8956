"""Every merge method and every decoder on a small network of every family: right, or refused in one line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from builders import FAMILIES, call, make_case
from torch import Tensor

import coin
from coin.core.batches import take
from coin.errors import CoinError
from coin.merging.method import Method

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROW = [0.4, 0.6]
TRAINED: dict[str, Any] = {"lr": 1e-5, "steps": 2, "start": "average"}
KEPT: Any = {
    "batchnorm": "average"
}  # which policy is better is tried once a family, by the first method
METHODS: dict[str, Callable[[], Method]] = {
    "average": coin.Average,
    "coin": lambda: coin.Coin(fisher_data="own", **KEPT),
    "regmean_linear": lambda: coin.RegMean("linear", gram_data="own", **KEPT),
    "regmean_all": lambda: coin.RegMean("all", gram_data="own", **KEPT),
    "head_fit": lambda: coin.HeadFit(**KEPT),
    "refit": lambda: coin.Refit(),
    "distillation": lambda: coin.Distillation(**TRAINED),
}
SWAPPED = ("average", "regmean_all", "refit")  # one a way to depend on the order, to save time
TWINS = ("coin", "regmean_all", "head_fit", "refit")
DECODERS = ("linear", "ridge", "feature_ridge")
HEAD = ("head_fit", "refit")
TWO_HEADS = ("timm/volo", "timm/crossvit", "timm/efficientformer", "hugging_face/swiftformer")
POSITIONS = ("hugging_face/opt", "hugging_face/llama", "hugging_face/mixtral")
READ_FEATURES = (*HEAD, "feature_ridge")
REFUSED: dict[str, dict[str, str]] = {
    "timm/resnetv2": dict.fromkeys(
        READ_FEATURES, "found no Linear layer"
    ),  # its head is a convolution
    **{family: dict.fromkeys(READ_FEATURES, "expected one row a sample") for family in POSITIONS},
    **{family: dict.fromkeys(HEAD, "are not its head") for family in TWO_HEADS},
}
"""What is refused for whom: family → method or decoder → a part of the line."""
assert REFUSED.keys() <= set(FAMILIES)


class Problems(list[str]):
    """What went wrong in a family, all of which one test tells."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.refused = dict(REFUSED.get(family, {}))

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Note what a block asserts or raises, unless it is the refusal that is expected."""
        line = self.refused.pop(what, None)
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            if not (
                line
                and isinstance(error, CoinError)
                and line in str(error)
                and "\n" not in str(error)
            ):
                self.append(f"{what}: {type(error).__name__}: {text}")
        else:
            if line:
                self.append(f"{what}: was not refused, expected '{line}'")


def check_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"{what}: off by {error:.2g}"  # a NaN is not


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fisher_is_the_slow_reference(family: str) -> None:
    case = make_case(family)
    network, batch = case.experts[0], case.tasks[0][1]
    before = case.answers(network, batch)  # what a network keeps from a pass must not hide anything
    found = coin.fisher_diagonal(network, [batch])
    copy = deepcopy(case.untouched).eval()
    parameters = {name: each for name, each in copy.named_parameters() if each.requires_grad}
    expected = {name: torch.zeros_like(each) for name, each in parameters.items()}
    for place in range(len(before)):
        pair = take(
            batch, torch.tensor([place, place])
        )  # PyTorch's own backward errs for batches of one
        for logit in call(copy, pair)[0]:
            gradients = torch.autograd.grad(
                logit,
                list(parameters.values()),
                retain_graph=True,
                materialize_grads=True,
                allow_unused=True,
            )
            for total, gradient in zip(expected.values(), gradients, strict=True):
                total += gradient.square() / len(before)
    largest = max(float(each.max()) for each in expected.values())
    assert found.keys() == expected.keys()
    wrong = {
        name: f"{float((found[name] - each).abs().max() / each.abs().max()):.2g}"
        for name, each in expected.items()
        if not bool(((found[name] - each).abs() <= 1e-6 * each.abs().max() + 1e-14 * largest).all())
    }
    assert not wrong, wrong
    assert torch.equal(case.answers(network, batch), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_is_right_or_refused(family: str) -> None:
    """Finite; the same in any order of the experts; identical experts to themselves; the experts are left as found."""
    case, problems = make_case(family), Problems(family)
    first, second = case.experts
    states = [deepcopy(expert.state_dict()) for expert in case.experts]
    wanted = sum(
        share * case.answers(expert) for share, expert in zip(ROW, case.experts, strict=True)
    )
    own = case.answers(first)

    def experts(networks: list[Any], tasks: list[Any]) -> coin.Experts:
        return coin.Experts(networks, calibration=tasks, initial=case.initial)

    pair = experts([first, second], case.tasks)
    swapped = experts([second, first], case.tasks[::-1])
    few = [[take(task[0], slice(0, 3))] for task in case.tasks]
    same = experts([first, deepcopy(first)], few)
    residuals = {}
    for name, make in METHODS.items():
        with problems.of(name):
            merged = case.answers(make().coded_model(pair, ROW).network)
            assert merged.shape == wanted.shape
            assert bool(torch.isfinite(merged).all())
            residuals[name] = float((merged - wanted).norm() / wanted.norm())
            if name in SWAPPED:
                moved = make().coded_model(swapped, ROW[::-1])
                check_close(case.answers(moved.network), merged, 1e-6, "in the other order")
            if name in TWINS:
                check_close(
                    case.answers(make().coded_model(same, ROW).network),
                    own,
                    1e-6,
                    "identical experts",
                )
            if (
                name == "distillation"
            ):  # its start's policy is chosen on other batches, which BatchNorms see too
                starts = []
                for policy in ("average", "recalibrate"):
                    start = case.answers(coin.Average(batchnorm=policy).make(pair, ROW).network)
                    starts.append(float((start - wanted).norm() / wanted.norm()))
                assert residuals[name] <= 1.1 * max(starts), (residuals, starts)
    for expert, state in zip(case.experts, states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in expert.state_dict().items())
    assert torch.equal(case.answers(first), own)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoder_is_right_or_refused(family: str) -> None:
    case, problems, code = make_case(family), Problems(family), coin.Code([ROW])
    coded = coin.merge_networks(coin.Average(batchnorm="average"), case.experts, code)
    system = coin.Coded(code, case.experts, coded)
    batch, survivor = case.tasks[1][0], case.experts[1]
    samples = [batch for task in case.tasks for batch in task]
    by_hand = (case.answers(coded[0], batch) - ROW[1] * case.answers(survivor, batch)) / ROW[0]
    lost = deepcopy(case.experts[0])
    for decoder in DECODERS:
        with problems.of(decoder):
            system.fit_decoder(samples, [0], decoder)
            decoded = system.decode(batch)
            assert decoded.shape == (1, *by_hand.shape)
            assert bool(torch.isfinite(decoded).all())
            if decoder == "linear":
                check_close(decoded[0], by_hand, 1e-9, "by hand")
            else:
                score = system.score(decoded)
                assert bool(((score >= 0) & (score <= 1)).all()), score
    assert all(
        torch.equal(a, b)
        for a, b in zip(lost.parameters(), case.experts[0].parameters(), strict=True)
    )
    assert not problems, "\n".join(problems)
