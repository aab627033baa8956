import pytest
import torch

from coin.data.sampling import Stream, make_generator, stratified_order

COUNTS = torch.tensor([40, 20, 0, 10])
LABELS = torch.arange(4).repeat_interleave(COUNTS)


def drawn(*keys):
    return torch.rand(3, generator=make_generator(*keys)).tolist()


def test_streams_differ_and_repeat():
    first = drawn(0, 1)
    assert drawn(0, 1) == first
    assert first not in [drawn(1, 0), drawn(0, 1, 0), drawn(0, 2)]
    assert len(set(Stream)) == len(Stream.__members__)


@pytest.mark.parametrize("stop", range(1, 71))
def test_every_prefix_of_a_stratified_order_is_in_proportion(stop):
    order = stratified_order(LABELS, make_generator(0))
    counts = LABELS[order[:stop]].bincount(minlength=4)
    proportion = COUNTS * stop / 70
    assert (counts - proportion).abs().max() <= 1
