"""Many experts merged from files, with few tensors alive."""

import weakref
from pathlib import Path

import torch

from coin.commands.merge import merge
from coin.files.safetensors import StateFile
from coin.merging import Coin
from coin.networks import BatchNormPolicy, load_network
from coin.statistics import fisher_diagonal
from coin.statistics.files import save_statistic


def test_a_merge_of_six_experts_keeps_few_of_their_tensors(write_experts, tmp_path, monkeypatch):
    experts = {}
    fishers = {}
    for task, place in write_experts([3] * 6).items():
        network = load_network(Path(place)).network
        experts[task] = Path(place)
        fishers[task] = tmp_path / f"{task}.fisher.safetensors"
        fisher = fisher_diagonal(network, [torch.randn(5, 3, 16, 16)])
        save_statistic(fishers[task], fisher, network, data="own")
    alive = weakref.WeakSet()
    counts = []
    read = StateFile.__getitem__

    def counted(file, name):
        tensor = read(file, name)
        alive.add(tensor)
        counts.append(len(alive))
        return tensor

    monkeypatch.setattr(StateFile, "__getitem__", counted)
    method = Coin(batchnorm=BatchNormPolicy.average)
    row = [0.1, 0.2, 0.1, 0.3, 0.1, 0.2]
    merge(method=method, output=tmp_path, code=[row], experts=experts, fisher=fishers)
    assert len(counts) > 6 * 20
    assert max(counts) <= 4
