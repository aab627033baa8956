import pytest
import torch

from coin.data.sampling import Stream, TrainingBatches, evaluation_batches, seeded, stratified_order
from coin.errors import DataError


def positions(batches):
    return [draw.positions.tolist() for draw in batches]


def flat(batches):
    return [position for batch in positions(batches) for position in batch]


@pytest.mark.parametrize(("samples", "world_size"), [(10, 1), (11, 2), (7, 3), (2, 3)])
def test_evaluation_covers_every_sample_exactly_once(samples, world_size):
    shards = [evaluation_batches(samples, 3, rank, world_size) for rank in range(world_size)]
    assert [flat(shard) for shard in shards] == [list(range(r, samples, world_size)) for r in range(world_size)]
    assert all(draw.epoch is None and len(draw.positions) <= 3 for shard in shards for draw in shard)


def test_training_order_depends_on_seed_and_epoch_alone():
    batches = TrainingBatches(50, 8, seed=3)
    first = positions(batches)
    assert positions(TrainingBatches(50, 8, seed=3)) == first
    assert positions(TrainingBatches(50, 8, seed=4)) != first
    batches.set_epoch(1)
    assert positions(batches) == positions(TrainingBatches(50, 8, seed=3, epoch=1)) != first
    assert {draw.epoch for draw in batches} == {1}
    assert sorted(flat(batches)) == list(range(50))


@pytest.mark.parametrize(("samples", "sizes"), [(16, [8, 8]), (20, [8, 8, 4]), (18, [8, 8, 2]), (17, [8, 8]), (2, [2])])
def test_training_keeps_the_partial_batch_but_never_one_sample(samples, sizes):
    batches = TrainingBatches(samples, 8, seed=0)
    assert [len(batch) for batch in positions(batches)] == sizes
    assert len(batches) == len(sizes)


@pytest.mark.parametrize("samples", [40, 41, 43, 50, 52])
def test_training_ranks_are_disjoint_and_equally_long(samples):
    ranks = [TrainingBatches(samples, 4, seed=0, rank=rank, world_size=3) for rank in range(3)]
    shapes = [[len(batch) for batch in positions(rank)] for rank in ranks]
    assert shapes[0] == shapes[1] == shapes[2]
    assert len(ranks[0]) == len(shapes[0])
    assert min(shapes[0]) > 1
    seen = [position for rank in ranks for position in flat(rank)]
    assert len(set(seen)) == len(seen) > samples - 6
    with pytest.raises(DataError, match="3 training samples over 2 process"):
        TrainingBatches(3, 2, seed=0, world_size=2)


def test_streams_differ_and_repeat():
    draws = {keys: torch.rand(3, generator=seeded(*keys)).tolist() for keys in [(0, 1), (1, 0), (0, 1, 0), (0, 2)]}
    assert len({tuple(draw) for draw in draws.values()}) == 4
    assert torch.rand(3, generator=seeded(0, 1)).tolist() == draws[0, 1]
    assert len(set(Stream)) == len(Stream.__members__)


def test_every_prefix_of_a_stratified_order_is_in_proportion():
    labels = torch.tensor([0] * 40 + [1] * 20 + [3] * 10)
    order = stratified_order(labels, seeded(0))
    assert sorted(order.tolist()) == list(range(70))
    for stop in range(1, 71):
        counts = torch.bincount(labels[order[:stop]], minlength=4)
        assert (counts - torch.tensor([40, 20, 0, 10]) * stop / 70).abs().max() <= 1
    assert not torch.equal(order, stratified_order(labels, seeded(1)))
