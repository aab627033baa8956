from itertools import combinations

import pytest
import torch

from coin.coding import Answers, LinearDecoder, convex
from coin.errors import ConfigurationError

SIZES = [(n, r) for n in range(1, 9) for r in range(1, min(n, 4) + 1)]


@pytest.mark.parametrize(("experts", "coded"), SIZES)
def test_every_erasure_of_a_ready_code_decodes_exactly_and_amplifies_less_than_of_random_ones(experts, coded):
    code = convex(experts, coded)
    assert (code.num_coded, code.num_experts) == (coded, experts)
    generator = torch.Generator().manual_seed(experts * 10 + coded)
    outputs = torch.randn(experts, 3, 2, generator=generator, dtype=torch.float64)
    erasures = code.erasures()
    assert len(erasures) == sum(len(list(combinations(range(experts), k))) for k in range(1, coded + 1))
    for erased in erasures:
        arrived = outputs.clone()
        arrived[list(erased)] = torch.nan
        decoded = LinearDecoder(code, erased).decode(Answers(arrived, code.encode(outputs)))
        torch.testing.assert_close(decoded, outputs[list(erased)], rtol=1e-11, atol=1e-11)
    worst = code.worst_amplification()
    # Uniform weights are the optimum of one row (1/min β ≥ N); copies, of N rows.
    if coded in (1, experts):
        assert worst == pytest.approx(experts if coded == 1 else 1)
    rows = torch.rand(200, coded, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    subsets = torch.tensor(list(combinations(range(experts), coded)))
    rows /= rows.sum(2, keepdim=True)
    smallest = torch.linalg.svdvals(rows[:, :, subsets].transpose(1, 2))[..., -1].amin(1)
    assert worst <= float(1 / smallest.max()) * (1 + 1e-12)


@pytest.mark.parametrize(("experts", "coded"), [(0, 1), (3, 0), (3, 4)])
def test_sizes_are_checked(experts, coded):
    with pytest.raises(ConfigurationError, match=f"{coded} coded models for {experts} experts"):
        convex(experts, coded)
