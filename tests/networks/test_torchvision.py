"""Classifiers of torchvision's families, but VGG and ViT (4 to 8 GB): merged, decoded, compressed, saved and loaded."""

from pathlib import Path

import pytest
import torch

import coin
from coin.networks import NetworkConfig, build_network, load_network, save_network
from coin.networks.calling import clone

SIZES = {"maxvit_t": 224}  # the least that they take, where that is more than 64 pixels
FAMILIES = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s maxvit_t
    mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5
    swin_t swin_v2_t"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES.split())
def test_a_classifier_of_torchvision_goes_all_the_way(name: str, tmp_path: Path) -> None:
    side, code = SIZES.get(name, 64), coin.Code([[0.4, 0.6]])
    torch.manual_seed(0)
    config = NetworkConfig(name, image_size=side)
    initial = build_network(config, 3).eval()
    experts = [clone(initial), clone(initial)]
    with torch.no_grad():
        for parameter in (parameter for expert in experts for parameter in expert.parameters()):
            parameter += 0.01 * parameter.abs().mean() * torch.randn_like(parameter)
    inputs = [[torch.randn(3, 3, side, side)] for _ in experts]

    average = coin.merge_networks(coin.Average(batchnorm="average"), experts, code)[0].state_dict()
    for (key, merged), *own in zip(average.items(), *(expert.state_dict().values() for expert in experts), strict=True):
        if merged.is_floating_point():
            torch.testing.assert_close(merged, 0.4 * own[0] + 0.6 * own[1], msg=key)

    system = coin.Coded(code, experts, coin.merge_networks(coin.Refit(), experts, code, calibration=inputs))
    decoded = system.fit_decoder(inputs[0], [0], "linear").decode(inputs[0][0])
    with torch.no_grad():
        by_hand = (system.coded[0](inputs[0][0]) - 0.6 * experts[1](inputs[0][0])) / 0.4
    assert torch.isfinite(decoded).all()
    torch.testing.assert_close(decoded[0], by_hand)
    system.save(tmp_path / "system.safetensors")
    assert torch.equal(coin.Coded.load(tmp_path / "system.safetensors", experts).decode(inputs[0][0]), decoded)

    made = coin.compress(experts[0], initial, bits=4)
    made.save(tmp_path / "small.safetensors")
    small = coin.Compressed.load(tmp_path / "small.safetensors", initial).network().state_dict()
    assert all(torch.equal(tensor, small[key]) for key, tensor in made.network().state_dict().items())
    expert, start = dict(experts[0].named_parameters()), dict(initial.named_parameters())
    lost, moved = (torch.stack([(each[key] - expert[key]).norm() for key in expert]).norm() for each in (small, start))
    assert lost < 0.15 * moved

    save_network(tmp_path / "expert.safetensors", experts[0], config, 3, {})
    network = load_network(tmp_path / "expert.safetensors").network
    with torch.no_grad():
        assert torch.equal(network(inputs[0][0]), experts[0](inputs[0][0]))
