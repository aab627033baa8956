import pytest

from coin.coding import Code, DecoderKind
from coin.evaluation.variants import NONE, Variant


@pytest.mark.parametrize(("method", "losses"), [("average", 2), (NONE, 1)])
def test_without_a_coded_model_the_loss_of_every_expert_is_none_to_survive(method, losses):
    code = Code([[0.7, 0.3], [0.3, 0.7]])
    variant = Variant(method, code, networks=() if method == NONE else (0, 1))
    assert variant.costs(DecoderKind.ridge, kept=0, num_lost=1)["losses"] == losses
