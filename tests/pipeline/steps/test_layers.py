"""The comparison of coded models and experts, which says how far the experts are apart."""

import warnings
from pathlib import Path

import pytest
import torch

from coin.coding import uniform
from coin.errors import CoinWarning
from coin.merging import Average, Experts
from coin.networks import NetworkConfig, build_network, save_network
from coin.networks.experts import ExpertFiles
from coin.pipeline.steps.code import SeedCode
from coin.pipeline.steps.layers import compare_layers
from coin.pipeline.steps.merge import make_coded_models


@pytest.mark.parametrize(
    ("moved", "said"), [(0.001, "near one another"), (0.1, "far from one"), (None, "far from one")]
)
def test_it_says_how_far_experts_are_apart_and_warns_of_different_starts(
    moved: float | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, paths = NetworkConfig("small_resnet", 8, options={"width": 2}), {}
    for seed in range(2):
        network = build_network(config, 3, seed=seed if moved is None else 0)
        torch.manual_seed(seed)
        for parameter in network.parameters():
            parameter.data += (moved or 0) * parameter.std(correction=0) * torch.randn_like(parameter)
        paths[f"task{seed}"] = tmp_path / f"{seed}.safetensors"
        save_network(paths[f"task{seed}"], network, config, 3, {})
    experts = Experts(ExpertFiles(paths))
    coded = make_coded_models(Average(batchnorm="average"), SeedCode(uniform(2)), experts, tmp_path, 5)  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compare_layers(tmp_path / "layers.csv", ExpertFiles(paths), {path: {} for path in coded})
    told = [str(each.message) for each in caught if each.category is CoinWarning]
    assert [" different starts " in each for each in told] == [True] * (moved is None)
    assert said in capsys.readouterr().err
