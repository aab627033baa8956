"""Sums, shards and their reduction over processes."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn

from coin.errors import ConfigurationError, StateError
from coin.statistics import Sums, fisher_sums, gram_sums, reduce_sums, shard


def network_and_inputs():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return network, torch.randn(7, 3, 8, 8)


def of_this_process():
    """Run in each of two processes: what the second holds of the sums of both goes to a file."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    network, inputs = network_and_inputs()
    own = inputs[list(shard(len(inputs), rank, 2))]
    names = ("a", "b", "c")[rank : rank + 2]  # each process has what the other may lack
    uneven = Sums({name: torch.full((2,), rank + 1.0) for name in names}, 1, 1.0)
    parts = fisher_sums(network, [own]), gram_sums(network, [own]), uneven
    found = [reduce_sums(sums) for sums in parts]
    if rank == 1:
        torch.save([(dict(sums.values), sums.count, sums.passes) for sums in found], sys.argv[1])
    torch.distributed.barrier()
    os._exit(0)  # gloo may abort a process that ends while the other one still listens


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, __file__, str(tmp_path / "sums.pt")]
    subprocess.run(command, check=True, timeout=120, cwd=root, env=environment, capture_output=True)
    *found, uneven = torch.load(tmp_path / "sums.pt", weights_only=True)
    network, inputs = network_and_inputs()
    for (values, count, passes), sums in zip(found, (fisher_sums, gram_sums), strict=True):
        expected = sums(network, [inputs])
        assert (count, passes) == (7, expected.passes)
        for name, value in expected.values.items():
            assert (values[name] - value).norm() <= 1e-6 * value.norm(), name
    found = {name: value.tolist() for name, value in uneven[0].items()}
    assert found == {"a": [1, 1], "b": [3, 3], "c": [2, 2]}


def test_the_mean_divides_by_the_count():
    sums = Sums({"a": torch.tensor([6.0, 4.0])}, 4, 12.0)
    assert reduce_sums(sums).mean()["a"].tolist() == [1.5, 1.0]
    with pytest.raises(StateError, match="found 0 calibration samples"):
        Sums({}, 0, 0.0).mean()


@pytest.mark.parametrize(("n", "world"), [(7, 2), (3, 3)])
def test_shards_are_a_partition(n, world):
    taken = [list(shard(n, rank, world)) for rank in range(world)]
    sizes = [len(places) for places in taken]
    assert sorted(chain.from_iterable(taken)) == list(range(n))
    assert max(sizes) - min(sizes) <= 1


def test_fewer_samples_than_processes_are_refused():
    with pytest.raises(ConfigurationError, match="found 2 calibration samples for 3 processes"):
        shard(2, 0, 3)


if __name__ == "__main__":
    of_this_process()
