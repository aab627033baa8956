"""What is scored of decoded answers."""

import torch

from coin.coding import Answers, make_decoder, uniform
from coin.evaluation.scores import FittedDecoder
from coin.evaluation.variants import Variant


def test_an_answer_that_is_nan_is_counted_for_no_class():
    code = uniform(2)
    decoder = make_decoder("linear", code, [0])
    fitted = FittedDecoder(Variant("coded", code), decoder, [(0,)], [2, 2])
    own = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0]])
    answers = Answers(torch.stack([own, own]), own[None].clone())
    answers.coded[0, 2] = torch.nan
    fitted.update(0, answers, torch.tensor([0, 1, 0]), 2)
    assert fitted.confusions[0].compute().tolist() == [[1, 0], [0, 1]]
    assert fitted.scores[0].compute()["agreement"] == 2 / 3
