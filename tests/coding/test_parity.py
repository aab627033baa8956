"""The code as a check: an expert that answers wrongly is found out, and named."""

import copy

import pytest
import torch
from torch import nn

from coin.coding import Answers, Code, fault_score, make_decoder, parity_residual, parity_significance
from coin.errors import DecodingError

CODE = Code([[0.3, 0.3, 0.4]])


def networks():
    """Three experts that share much of their first layer, and the average of them as the coded model."""
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    experts = []
    for _ in range(3):
        expert = copy.deepcopy(shared)
        for parameter in expert.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        experts.append(expert)
    coded = copy.deepcopy(shared)
    for parameter, *others in zip(coded.parameters(), *(expert.parameters() for expert in experts), strict=True):
        parameter.data = sum(weight * other.data for weight, other in zip((0.3, 0.3, 0.4), others, strict=True))
    return experts, coded


@torch.no_grad()
def answers_of(experts, coded, seed, samples=200):
    inputs = torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    features = [network[:2](inputs) for network in (*experts, coded)]
    logits = torch.stack([network[2](own) for network, own in zip((*experts, coded), features, strict=True)])
    return Answers(logits[:3], logits[3:], features[:3], features[3:])


def test_residual_and_significance_by_hand():
    own = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])
    code = Code([[0.5, 0.5]])
    assert parity_residual(code, Answers(own, code.encode(own))).tolist() == [0.0]
    residual = parity_residual(code, Answers(own, torch.tensor([[[2.0, 3.0]]])))
    assert residual.tolist() == pytest.approx([2**0.5], rel=1e-12)
    calibration = torch.tensor([4.0, 1.0, 3.0, 2.0])
    found = parity_significance(torch.tensor([0.5, 2.0, 2.5, 9.0]), calibration)
    assert found.tolist() == pytest.approx([1.0, 0.8, 0.6, 0.2])


@pytest.mark.parametrize("wrong", [None, 0, 1, 2])
@pytest.mark.parametrize("kind", ["ridge", "feature_ridge"])
def test_an_expert_with_corrupted_weights_is_flagged_and_named(kind, wrong):
    experts, coded = networks()
    calibration = answers_of(experts, coded, seed=1)
    decoders = [make_decoder(kind, CODE, [expert]).fit(calibration) for expert in range(3)]
    new = answers_of(experts, coded, seed=4)
    if wrong is not None:
        weight = experts[wrong][0].weight
        weight.data = weight.data[torch.randperm(20, generator=torch.Generator().manual_seed(2))]
    answers = answers_of(experts, coded, seed=3)
    odd = fault_score(decoders, answers, new)
    share = parity_significance(parity_residual(CODE, answers), parity_residual(CODE, calibration))
    if wrong is None:
        assert float((share < 0.02).double().mean()) < 0.06
        assert float(odd.max()) < 1.3
    else:
        assert float((share < 0.02).double().mean()) > 0.7
        assert (int(odd.argmax()), float(odd.max()) > 3) == (wrong, True)


def test_the_linear_decoder_of_one_row_accuses_everyone_alike():
    experts, coded = networks()
    answers = answers_of(experts, coded, seed=1)
    decoders = [make_decoder("linear", CODE, [expert]).fit(answers) for expert in range(3)]
    experts[0][0].weight.data *= -1
    odd = fault_score(decoders, answers_of(experts, coded, seed=3), answers)
    assert odd.min() > 3
    torch.testing.assert_close(odd, odd[:1].expand(3))
    with pytest.raises(DecodingError, match="found 0 coded models' answers, the code has 1; give all"):
        parity_residual(CODE, answers.without_coded())
    with pytest.raises(DecodingError, match="expected each expert alone"):
        fault_score(decoders[:2], answers, answers)
