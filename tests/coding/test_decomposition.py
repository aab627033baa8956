import pytest
import torch

from coin.coding.decomposition import thin_svd


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (7, 7), (3, 4)])
def test_a_matrix_is_put_together_again(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vt = thin_svd(matrix)
    least = min(shape)
    assert u.shape == (shape[0], least)
    assert vt.shape == (least, shape[1])
    torch.testing.assert_close(u @ (s[:, None] * vt), matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix), rtol=1e-12, atol=1e-12)
    for columns in (u, vt.T):
        torch.testing.assert_close(columns.T @ columns, torch.eye(least, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_matrix_of_lower_rank_keeps_its_zero_singular_values():
    matrix = torch.outer(torch.arange(3.0, dtype=torch.float64), torch.arange(9.0, dtype=torch.float64))
    s = thin_svd(matrix)[1]
    assert float(s[1:].max()) < 1e-12 * float(s[0])
