import torch

from coin.data.sampling import Stream, make_generator, stratified_order


def test_streams_differ_and_repeat():
    draws = {
        keys: torch.rand(3, generator=make_generator(*keys)).tolist() for keys in [(0, 1), (1, 0), (0, 1, 0), (0, 2)]
    }
    assert len({tuple(draw) for draw in draws.values()}) == 4
    assert torch.rand(3, generator=make_generator(0, 1)).tolist() == draws[0, 1]
    assert len(set(Stream)) == len(Stream.__members__)


def test_every_prefix_of_a_stratified_order_is_in_proportion():
    labels = torch.tensor([0] * 40 + [1] * 20 + [3] * 10)
    order = stratified_order(labels, make_generator(0))
    assert sorted(order.tolist()) == list(range(70))
    for stop in range(1, 71):
        counts = torch.bincount(labels[order[:stop]], minlength=4)
        assert (counts - torch.tensor([40, 20, 0, 10]) * stop / 70).abs().max() <= 1
    assert not torch.equal(order, stratified_order(labels, make_generator(1)))
