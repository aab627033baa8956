import torch

from coin.statistics.rules.linear import add_gram, contract_pairs
from coin.statistics.solvers import solve_damped


def test_each_group_is_damped_by_its_own_mean():
    torch.manual_seed(0)
    rows = torch.randn(2, 9, 4, dtype=torch.float64) * torch.tensor([1.0, 100.0])[:, None, None]
    gram = rows.mT @ rows
    pull = torch.randn(2, 3, 4, dtype=torch.float64)
    found = solve_damped(gram, pull, 0.1, "layer")
    for group in range(2):
        ridge = 0.1 * gram[group].trace() / 4
        wanted = pull[group] @ torch.linalg.inv(gram[group] + ridge * torch.eye(4))
        torch.testing.assert_close(found[group], wanted)


def test_a_sum_of_squares_that_cancels_is_not_negative():
    torch.manual_seed(0)
    cotangents = torch.randn(1, 1, 1, 64).expand(1, 1, 3, 64)  # [V, B, T, O], the same at all positions
    inputs = torch.randn(1, 3, 64)
    inputs -= inputs.mean(1, keepdim=True)  # the gradient's sum over positions is 0
    total = torch.zeros(1, 64, 64)
    add_gram(total, contract_pairs(cotangents), inputs)
    assert total.amin() >= 0
    assert total.amax() < 1e-4
