from types import SimpleNamespace

import pytest
import torch

from coin.data import Augmentation, Samples
from coin.data.loading import Batches
from coin.errors import DataError


def batches(count, size, *, rank=0, world=1, epoch=0, seed=0, augmentation=Augmentation.none):
    """Return the positions of a process's batches of so many samples."""
    tokens = torch.arange(count).view(-1, 1)
    process = SimpleNamespace(global_rank=rank, world_size=world, current_epoch=epoch)
    found = Batches(Samples.of(tokens, torch.zeros(count)), size, process, seed, augmentation)
    positions = [batch.flatten().tolist() for batch, _ in found]
    assert len(found) == len(positions)
    return positions


def flat(parts):
    return [position for part in parts for position in part]


@pytest.mark.parametrize(("samples", "world"), [(10, 1), (11, 2), (7, 3), (2, 3)])
def test_evaluation_covers_every_sample_exactly_once(samples, world):
    shards = [batches(samples, 3, rank=rank, world=world, augmentation=None) for rank in range(world)]
    assert [flat(shard) for shard in shards] == [list(range(rank, samples, world)) for rank in range(world)]
    assert all(len(batch) <= 3 for shard in shards for batch in shard)


def test_training_order_depends_on_seed_and_epoch_alone():
    first = batches(50, 8, seed=3)
    assert batches(50, 8, seed=3) == first
    assert batches(50, 8, seed=4) != first
    assert batches(50, 8, seed=3, epoch=1) != first
    assert sorted(flat(first)) == list(range(50))


@pytest.mark.parametrize(("samples", "sizes"), [(16, [8, 8]), (20, [8, 8, 4]), (18, [8, 8, 2]), (17, [8, 8]), (2, [2])])
def test_training_keeps_the_partial_batch_but_never_one_sample(samples, sizes):
    assert [len(batch) for batch in batches(samples, 8)] == sizes


@pytest.mark.parametrize("samples", [40, 41, 43, 50, 52])
def test_training_ranks_are_disjoint_and_equally_long(samples):
    ranks = [batches(samples, 4, rank=rank, world=3) for rank in range(3)]
    shapes = [[len(batch) for batch in rank] for rank in ranks]
    assert shapes[0] == shapes[1] == shapes[2]
    assert min(shapes[0]) > 1
    seen = flat(flat(ranks))
    assert len(set(seen)) == len(seen) > samples - 6
    with pytest.raises(DataError, match="3 training samples over 2 process"):
        batches(3, 2, world=2)
