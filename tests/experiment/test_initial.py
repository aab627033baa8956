"""The shared initialisation of tasks with different class counts."""

import pytest
import torch

from coin.data import Digits, Glyphs
from coin.experiment import Experiment
from coin.experiment.training import make_initial
from coin.merging import Average
from coin.networks import NetworkConfig, load_network


@pytest.mark.parametrize(
    "network",
    [NetworkConfig("small_resnet", 16, None, {"width": 4}), NetworkConfig("squeezenet1_1", 32)],
    ids=["small_resnet", "squeezenet"],
)
def test_experts_of_different_class_counts_start_from_one_body(network, tmp_path):
    tasks = {"digits": Digits(), "letters": Glyphs(classes="A-F")}
    experiment = Experiment("x", tasks, [Average()], network, output=str(tmp_path))
    assert make_initial(experiment) == experiment.layout.initial(10)
    ten, six = (load_network(experiment.layout.initial(count)).network.state_dict() for count in (10, 6))
    differing = [name for name in ten if ten[name].shape != six[name].shape or not torch.equal(ten[name], six[name])]
    assert 0 < len(differing) <= 2
    assert all(ten[name].shape != six[name].shape for name in differing)
