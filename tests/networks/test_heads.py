import pytest
import torch
from torch import nn

from coin.errors import StateError
from coin.networks import features_and_logits, head_name, pad_head, pad_logits, replace_head


class Named(nn.Module):
    """Its head is not the last Linear, so it says which it is."""

    head_name = "answer"

    def __init__(self):
        super().__init__()
        self.answer = nn.Linear(4, 3)
        self.unused = nn.Linear(9, 9)

    def forward(self, x):
        return self.answer(x)


class Tokens(nn.Module):
    """Applies its head to every token and averages."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x).mean(1)


def test_the_head_is_the_last_linear_or_named_or_the_last_convolution():
    assert head_name(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 4), nn.Dropout()))) == "2.0"
    assert head_name(Named()) == "answer"
    assert head_name(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Flatten())) == "1"
    with pytest.raises(StateError, match=r"no Linear or Conv2d layer in Sequential.*attribute 'head_name'"):
        head_name(nn.Sequential(nn.BatchNorm2d(3)))


@pytest.mark.parametrize("bias", [True, False])
def test_a_replaced_head_keeps_its_place_inputs_and_bias(bias):
    linear = nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 1000, bias=bias)))
    replace_head(linear, 3)
    assert linear(torch.zeros(2, 5)).shape == (2, 3)
    assert (linear[1][1].bias is not None) == bias
    convolution = nn.Sequential(nn.Conv2d(3, 10, 1, bias=bias), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    replace_head(convolution, 4)
    assert convolution(torch.zeros(2, 3, 6, 6)).shape == (2, 4)
    assert (convolution[0].bias is not None) == bias


def test_a_head_that_is_no_linear_map_is_refused():
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    network.head_name = "1"
    with pytest.raises(StateError, match="the head '1' is a ReLU, expected a Linear or a Conv2d"):
        replace_head(network, 3)


def test_features_are_the_heads_input_averaged_over_positions():
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 6, 4, generator=draw)
    features, logits = features_and_logits(Tokens(), tokens)
    assert features.shape == (2, 4)
    torch.testing.assert_close(features, tokens.mean(1))
    assert logits.shape == (2, 3)
    images = torch.randn(2, 3, 5, 7, generator=draw)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    features, logits = features_and_logits(convolution, images)
    torch.testing.assert_close(features, images.mean((2, 3)))
    named = Named()
    inputs = torch.randn(2, 4, generator=draw)
    assert torch.equal(features_and_logits(named, inputs)[0], inputs)
    assert not named.answer._forward_pre_hooks


def test_a_head_that_runs_twice_has_no_features():
    class Twice(Named):
        def forward(self, x):
            return self.answer(x) + self.answer(-x)

    with pytest.raises(StateError, match="ran 2 times in one pass, expected once"):
        features_and_logits(Twice(), torch.zeros(1, 4))


def test_pad_head_adds_zero_rows_or_the_given_ones():
    state = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.tensor([1.0, 2.0]), "body": torch.ones(4)}
    padded = pad_head(state, "fc", 4)
    assert torch.equal(padded["fc.weight"], torch.cat([torch.ones(2, 3), torch.zeros(2, 3)]))
    assert padded["fc.bias"].tolist() == [1.0, 2.0, 0.0, 0.0]
    assert padded["body"] is state["body"]
    filled = pad_head(state, "fc", 3, fill={"fc.weight": torch.tensor([7.0, 8.0, 9.0])})
    assert filled["fc.weight"][2].tolist() == [7.0, 8.0, 9.0]
    assert filled["fc.bias"].tolist() == [1.0, 2.0, 0.0]
    assert state["fc.weight"].shape == (2, 3)
    without_bias = pad_head({"fc.weight": torch.ones(2, 3, 1, 1)}, "fc", 3)
    assert without_bias.keys() == {"fc.weight"}
    assert without_bias["fc.weight"].shape == (3, 3, 1, 1)
    assert torch.equal(pad_head(state, "fc", 2)["fc.weight"], state["fc.weight"])
    with pytest.raises(StateError, match=r"'fc\.weight' has 2 outputs, expected at most 1"):
        pad_head(state, "fc", 1)


def test_pad_logits_adds_zeros():
    assert pad_logits(torch.ones(1, 2), 4).tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert pad_logits(torch.ones(3, 1, 2), 2).shape == (3, 1, 2)
    with pytest.raises(StateError, match="found 2 logits to pad to 1, expected at most 1; give the largest"):
        pad_logits(torch.ones(3, 1, 2), 1)
