"""Sums, shards and their reduction over processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from coin.errors import StateError
from coin.statistics import Sums, fisher_sums, gram_sums, reduce_sums, shard

WORKER = """
import os, sys, torch
from torch import distributed, nn
from coin.statistics import Sums, fisher_sums, gram_sums, reduce_sums, shard

distributed.init_process_group("gloo")
rank, world = distributed.get_rank(), distributed.get_world_size()
torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten(), nn.Linear(144, 3))
inputs = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))
mine = inputs[list(shard(len(inputs), rank, world))]
fisher, gram = reduce_sums(fisher_sums(network, [mine])), reduce_sums(gram_sums(network, [mine]))
names = ("a", "b", "c")[rank : rank + 2]  # each process has what the other may lack
uneven = Sums({name: torch.full((2,), rank + 1.0) for name in names}, 1, 1.0)
uneven = reduce_sums(uneven)
if rank == 1:  # every process holds the result
    torch.save([dict(fisher.values), fisher.count, fisher.passes, dict(gram.values), gram.count,
                dict(uneven.values)], sys.argv[1])
distributed.barrier()
os._exit(0)  # gloo may abort a process that ends while the other one still listens
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    script, result = tmp_path / "worker.py", tmp_path / "sums.pt"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command += [str(script), str(result)]
    subprocess.run(command, check=True, timeout=120, cwd=root, env=environment, capture_output=True)
    values, count, passes, grams, gram_count, uneven = torch.load(result, weights_only=True)

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten(), nn.Linear(144, 3))
    inputs = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    one, gram = fisher_sums(network, [inputs]), gram_sums(network, [inputs])
    assert (count, passes, gram_count) == (7, one.passes, 7)
    for name, value in one.values.items():
        assert (values[name] - value).norm() <= 1e-6 * value.norm(), name
    for name, value in gram.values.items():
        assert (grams[name] - value).norm() <= 1e-6 * value.norm(), name
    assert {name: value.tolist() for name, value in uneven.items()} == {"a": [1, 1], "b": [3, 3], "c": [2, 2]}


def test_the_mean_divides_by_the_count() -> None:
    assert torch.equal(Sums({"a": torch.tensor([6.0, 4.0])}, 4, 12.0).mean()["a"], torch.tensor([1.5, 1.0]))
    with pytest.raises(StateError, match="found 0 calibration samples"):
        Sums({}, 0, 0.0).mean()


def test_no_group_no_change() -> None:
    sums = Sums({"a": torch.ones(2)}, 1, 1.0)
    assert reduce_sums(sums) is sums


@pytest.mark.parametrize(("n", "world"), [(7, 2), (3, 3), (6, 3)])
def test_shards_are_a_partition(n: int, world: int) -> None:
    taken = [list(shard(n, rank, world)) for rank in range(world)]
    assert sorted(i for indices in taken for i in indices) == list(range(n))
    assert max(map(len, taken)) - min(map(len, taken)) <= 1
