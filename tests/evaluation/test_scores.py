import torch

from coin.evaluation.scores import Scores


def test_an_answer_that_is_nan_is_counted_for_no_class():
    scores = Scores(2)
    nan = torch.tensor([[torch.nan, torch.nan]])
    expert = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0]])
    scores.update(nan.expand(3, 2), expert, torch.tensor([0, 1, 0]))
    assert scores.compute()["confusion"].tolist() == [[0, 0], [0, 0]]
    scores.update(torch.cat([expert[:2], nan]), expert, torch.tensor([0, 1, 0]))
    assert scores.compute()["confusion"].tolist() == [[1, 0], [0, 1]]
    assert scores.compute()["agreement"] == 2 / 6
