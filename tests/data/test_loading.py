from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from coin.data import Augmentation, Samples
from coin.data.loading import Batches
from coin.errors import DataError


def batches(count, augmentation=Augmentation.none, rank=0, world=1, epoch=0, seed=0):
    """Return the places of the samples in a process's batches of four; to evaluate, with no augmentation."""
    samples = Samples.of(torch.arange(count).view(-1, 1), torch.zeros(count))
    trainer = SimpleNamespace(global_rank=rank, world_size=world, current_epoch=epoch)
    found = Batches(samples, 4, trainer, seed, augmentation)
    places = [batch.flatten().tolist() for batch, _ in found]
    assert len(found) == len(places)
    return places


def joined(batches):
    return list(chain.from_iterable(batches))


@pytest.mark.parametrize(("samples", "world"), [(10, 1), (11, 2), (7, 3), (2, 3)])
def test_evaluation_covers_every_sample_exactly_once(samples, world):
    for rank in range(world):
        found = batches(samples, None, rank, world)
        assert joined(found) == list(range(rank, samples, world))


def test_training_order_depends_on_seed_and_epoch_alone():
    first = batches(50)
    assert sorted(joined(first)) == list(range(50))
    assert batches(50) == first
    assert batches(50, seed=1) != first
    assert batches(50, epoch=1) != first


@pytest.mark.parametrize(
    ("samples", "sizes"),
    [(8, [4, 4]), (10, [4, 4, 2]), (11, [4, 4, 3]), (9, [4, 4]), (2, [2])],
)
def test_training_keeps_the_partial_batch_but_never_one_sample(samples, sizes):
    assert [len(batch) for batch in batches(samples)] == sizes


@pytest.mark.parametrize("samples", [40, 41, 43, 50, 52])
def test_processes_train_on_different_samples_in_batches_of_equal_sizes(samples):
    ranks = [batches(samples, rank=rank, world=3) for rank in range(3)]
    sizes = {tuple(map(len, rank)) for rank in ranks}
    assert len(sizes) == 1
    seen = joined(joined(ranks))
    assert len(set(seen)) == len(seen)
    assert len(seen) > samples - 6


def test_a_process_has_two_samples_to_train_on():
    with pytest.raises(DataError, match="3 training samples over 2 process"):
        batches(3, world=2)
