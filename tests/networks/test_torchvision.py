"""Classifiers of torchvision's families, but VGG and ViT (4 to 8 GB): merged, decoded, compressed, saved and loaded."""

import pytest
import torch

import coin
from coin.networks import NetworkConfig, build_network, load_network, save_network
from coin.networks.calling import clone

SIZES = {
    "maxvit_t": 224,
    "inception_v3": 96,
}  # the least that they take, where that is more than 64 pixels
FAMILIES = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t
    mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5
    swin_t swin_v2_t"""


def moved(network):
    """Return a copy whose parameters are a hundredth of their size off."""
    copy = clone(network)
    for parameter in copy.parameters():
        parameter += 0.01 * parameter.abs().mean() * torch.randn_like(parameter)
    return copy


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES.split())
def test_a_classifier_of_torchvision_is_decoded_compressed_and_read_back(name, tmp_path):
    torch.manual_seed(0)
    config = NetworkConfig(name, image_size=SIZES.get(name, 64))
    initial = build_network(config, 3).eval()
    experts = [moved(initial), moved(initial)]
    inputs = torch.randn(3, 3, config.image_size, config.image_size)

    coded = coin.merge_networks(coin.Refit(), experts, [[0.4, 0.6]], calibration=[[inputs]] * 2)
    system = coin.Coded([[0.4, 0.6]], experts, coded).fit_decoder([inputs], [0], "linear")
    assert system.decode(inputs).isfinite().all()

    made = coin.compress(experts[0], initial, bits=4)
    made.save(tmp_path / "small.safetensors")
    small = coin.Compressed.load(tmp_path / "small.safetensors", initial).network()
    torch.testing.assert_close(small.state_dict(), made.network().state_dict(), rtol=0, atol=0)

    save_network(tmp_path / "expert.safetensors", experts[0], config, 3, {})
    again = load_network(tmp_path / "expert.safetensors").network
    torch.testing.assert_close(again(inputs), experts[0](inputs))
