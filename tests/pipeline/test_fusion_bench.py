"""FusionBench's algorithms of coin, on a pool of tiny CLIP towers; where FusionBench is installed."""

import importlib
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

FOLDER = Path(__file__).parents[2] / "notebooks/fusion_bench"


@pytest.fixture
def algorithms(monkeypatch):
    pytest.importorskip("fusion_bench")
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    return importlib.import_module("coin_algorithms")


@pytest.fixture
def pool():
    modelpool = pytest.importorskip("fusion_bench.modelpool")
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    options = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    base = CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **options)).eval()
    towers, images = {}, {}
    for name in ("a", "b", "c"):
        towers[name] = deepcopy(base)
        for parameter in towers[name].parameters():
            parameter.data += 0.1 * parameter.std().nan_to_num(0.1) * torch.randn_like(parameter)
        images[name] = TensorDataset(torch.randn(60, 3, 16, 16), torch.zeros(60, dtype=torch.long))

    class Pool(modelpool.BaseModelPool):
        def load_train_dataset(self, dataset_name, *args, **kwargs):
            return images[dataset_name]

    return Pool(towers), towers, {name: each.tensors[0] for name, each in images.items()}


def test_refit_and_a_body_are_nearer_to_the_experts_than_their_average(algorithms, pool):
    models, towers, images = pool
    body = algorithms.Body(samples_per_task=40, rank=8, bits=8).run(models)
    refit = algorithms.Refit(samples_per_task=60).run(models)
    average = deepcopy(towers["a"])
    for name, parameter in average.named_parameters():
        parameter.data = torch.stack(
            [each.get_parameter(name).data for each in towers.values()]
        ).mean(0)

    def error(name, network):
        with torch.no_grad():
            own, other = (each(images[name]).pooler_output for each in (towers[name], network))
        return float((other - own).square().mean())

    assert body["stored_mib"] > 0
    for name in towers:
        assert type(body[name]) is type(refit) is type(average)
        assert error(name, body[name]) < 0.2 * error(name, average)
    assert sum(error(name, refit) for name in towers) < sum(error(name, average) for name in towers)
