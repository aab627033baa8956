"""The recommended system in one call: equal to the long way, kept and read again, and refused in one line."""

import pytest
import torch
from torch import nn

import coin
from coin.errors import CoinError


@pytest.fixture
def start() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))


@pytest.fixture
def experts(start: nn.Module) -> list[nn.Module]:
    """Three networks near one start."""
    networks = []
    for _ in range(3):
        network = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
        moved = {name: w + 0.05 * torch.randn_like(w) for name, w in start.state_dict().items()}
        network.load_state_dict(moved)
        networks.append(network)
    return networks


@pytest.fixture
def calibration() -> list[list[torch.Tensor]]:
    return [[torch.randn(40, 6)] for _ in range(3)]


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(50, 6)


CASES = {
    "refit+rank16-4bit": {},
    "refit+rank2-8bit": {"rank": 2, "bits": 8},
    "base+rank16-4bit": {"method": coin.Base},
}


@pytest.mark.parametrize("label", CASES)
def test_it_is_the_long_way(label, start, experts, calibration, inputs) -> None:
    options = CASES[label]
    system = coin.stand_in(experts, calibration, initial=start, names="abc", **options)

    method = options.get("method", coin.Refit)(
        adapters={"rank": options.get("rank", 16)}, compress={"bits": options.get("bits", 4)}
    )
    code = coin.uniform(3)
    merged = coin.merge_networks(method, experts, code, initial=start, calibration=calibration)
    long_way = coin.Coded(code, experts, merged.compressed[label])
    long_way.fit_decoder(calibration[0], [0, 1, 2], "expert_head")
    for index, name in enumerate("abc"):
        answers = system.answer(inputs, expert=name)
        assert torch.equal(answers, long_way.decode(inputs, [index])[0])
        assert not torch.equal(answers, experts[index](inputs))


def test_a_saved_one_answers_alike(experts, calibration, inputs, tmp_path) -> None:
    system = coin.stand_in(experts, calibration)
    system.save(tmp_path / "system.safetensors")
    again = coin.Coded.load(tmp_path / "system.safetensors", experts)
    assert torch.equal(again.answer(inputs, expert=2), system.answer(inputs, expert=2))


MISTAKES = {
    "found method 'Refit', expected a class": {"method": "Refit"},
    "found rank=-1": {"rank": -1},
    "found bits=9": {"bits": 9},
    "found names": {"names": "aab"},
    "found no shared initialisation": {"method": coin.Base},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_wrong_options_are_refused(message, experts, calibration) -> None:
    with pytest.raises(CoinError, match=message):
        coin.stand_in(experts, calibration, **MISTAKES[message])


@pytest.mark.parametrize(
    ("count", "calibration", "message"),
    [
        (0, [], "0 experts, expected at least one"),
        (3, [[torch.zeros(9, 6)]], "calibration of 1 experts, expected 3"),
        (3, torch.zeros(3, 9, 6), "found a tensor for a task's calibration"),
    ],
)
def test_wrong_inputs_are_refused(count, calibration, message, experts) -> None:
    with pytest.raises(CoinError, match=message):
        coin.stand_in(experts[:count], calibration)
