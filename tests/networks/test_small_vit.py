import pytest
import torch

from coin.errors import ConfigurationError
from coin.networks import NetworkConfig, build_network
from coin.networks.heads import replace_head


def images(count=2, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_image_size_and_options_arrive():
    options = {"patch_size": 8, "depth": 2, "heads": 2, "width": 16, "mlp_width": 24}
    network = build_network(NetworkConfig("small_vit", 16, None, options), 3).eval()
    assert network.encoder.pos_embedding.shape == (1, 5, 16)
    assert len(network.encoder.layers) == 2
    assert network(images(size=16)).shape == (2, 3)


@pytest.mark.parametrize("options", [{"patch_size": 5}, {"patch_size": 0}, {"heads": 3}, {"width": -4}])
def test_sizes_that_do_not_divide_are_refused(options):
    with pytest.raises(ConfigurationError, match="cannot build small_vit for images of size 32") as caught:
        build_network(NetworkConfig("small_vit", 32, None, options), 3)
    assert "\n" not in str(caught.value)


def test_the_colours_of_an_image_do_not_matter():
    network = build_network(NetworkConfig("small_vit", 16, None, {"depth": 1}), 3).double().eval()
    replace_head(network.heads, 3)  # the fresh head is zero
    network.double()
    inputs = images(size=16).double()
    gain, offset = torch.tensor([0.5, 2.0, 3.0])[:, None, None], torch.tensor([1.0, -4.0, 0.3])[:, None, None]
    with torch.no_grad():
        logits = network(inputs)
        torch.testing.assert_close(network(gain * inputs + offset), logits, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(network(inputs.flip(3)), logits, rtol=1e-2)
