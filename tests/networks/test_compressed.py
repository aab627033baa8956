import copy

import pytest
import torch
from torch import nn

import coin
from coin.cli import main
from coin.errors import CoinError, ConfigurationError, FileError, StateError
from coin.networks import Compression, NetworkConfig, build_network, sources
from coin.networks.adapted import resident_nbytes
from coin.networks.batchnorm import folded_norms, mark_folded
from coin.networks.files import (
    load_network,
    nbytes_together,
    save_compressed,
    save_network,
)
from coin.networks.kept import kept_parameters

CONFIG = NetworkConfig("small_resnet", image_size=16, options={"width": 8})


def near(network, size=0.05):
    """A fine-tuned copy: every floating tensor a little off, BatchNorm's counters on."""
    torch.manual_seed(1)
    other = copy.deepcopy(network)
    for tensor in other.state_dict().values():
        if tensor.is_floating_point() and bool(tensor.isfinite().all()):
            tensor.add_(size * torch.randn_like(tensor) * tensor.std(unbiased=False).clamp(min=0.01))
        elif not tensor.is_floating_point():
            tensor.add_(5)
    return other


def same(first, second):
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def apart(network, other, inputs):
    with torch.no_grad():
        return float((network.eval()(inputs) - other.eval()(inputs)).norm() / network(inputs).norm())


@pytest.fixture
def base():
    return build_network(CONFIG, 6).eval()


@pytest.mark.parametrize("base_bits", [32, 8, 0])
@pytest.mark.parametrize("bits", [1, 3])
def test_a_compressed_network_is_read_back_to_the_last_bit(base, bits, base_bits, tmp_path):
    network = near(base)
    made = coin.compress(network, base if base_bits else None, base_bits=base_bits, bits=bits)
    read = made.network()
    path = tmp_path / "network.safetensors"
    made.save(path)
    again = coin.Compressed.load(path, base)
    assert same(again.network(), read)
    assert (again.nbytes, again.base_nbytes) == (made.nbytes, made.base_nbytes)
    assert read.state_dict()["stages.0.0.bn1.num_batches_tracked"] == 5
    assert not read.training
    inputs = torch.randn(20, 3, 16, 16)
    if base_bits:
        assert apart(network, read, inputs) < apart(network, base, inputs)


def test_more_bits_are_nearer_and_take_the_bytes_of_so_many_bits(base):
    network, inputs = near(base), torch.randn(50, 3, 16, 16)
    made = {bits: coin.compress(network, base, bits=bits) for bits in (1, 2, 3, 4, 8)}
    errors = [apart(network, each.network(), inputs) for each in made.values()]
    assert errors == sorted(errors, reverse=True)
    count = sum(tensor.numel() for tensor in network.parameters() if tensor.ndim > 1)
    assert (made[8].nbytes - made[3].nbytes) == pytest.approx(count * 5 / 8, rel=1e-3)


def test_the_base_takes_what_it_is_kept_in(base):
    whole = sum(tensor.nbytes for tensor in base.state_dict().values())
    shares = [coin.compress(near(base), base, bits=3, base_bits=bits).base_nbytes / whole for bits in (32, 8, 0)]
    assert shares[0] == 1
    assert 0.25 < shares[1] < 0.32
    assert shares[2] == 0
    equal = coin.compress(copy.deepcopy(base), base, bits=3)
    assert (equal.nbytes, same(equal.network(), base)) == (0, True)


@pytest.mark.parametrize("classes", [4, 9])
def test_heads_of_other_class_counts_are_deltas_from_the_rows_that_are_there(base, classes, tmp_path):
    network = build_network(CONFIG, classes)
    state = {name: t for name, t in base.state_dict().items() if not name.startswith("fc.")}
    network.load_state_dict(state, strict=False)
    before = torch.get_rng_state()
    made = coin.compress(network, base, bits=8)
    assert made.network().fc.weight.shape[0] == classes
    torch.testing.assert_close(made.network().fc.weight, network.fc.weight, rtol=0, atol=0.01)
    made.save(tmp_path / "x.safetensors")
    assert same(coin.Compressed.load(tmp_path / "x.safetensors", base).network(), made.network())
    assert torch.equal(torch.get_rng_state(), before)


class Tied(nn.Module):
    def __init__(self, num_classes=50):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.out = nn.Linear(16, 50, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("places", torch.arange(4)[None], persistent=False)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, tokens):
        return self.out(self.embed(tokens)) * self.scale + 0 * self.mask.exp().sum()


def test_tied_weights_are_kept_once_and_stay_tied(monkeypatch, tmp_path):
    base = Tied()
    network = near(base, 0)
    with torch.no_grad():
        network.embed.weight.add_(0.1 * torch.randn(50, 16))
    made = coin.compress(network, base, bits=8)
    assert made.nbytes <= 50 * 16 + 2 * 50 + 8
    read = made.network()
    assert read.out.weight is read.embed.weight
    torch.testing.assert_close(read.out.weight, network.out.weight, rtol=0, atol=0.01)
    assert torch.equal(read.mask, base.mask)
    monkeypatch.setitem(sources.Own.kinds, "tied", Tied)
    save_network(tmp_path / "tied.safetensors", network, NetworkConfig("tied"), 50, {})
    whole = load_network(tmp_path / "tied.safetensors")
    assert whole.network.out.weight is whole.network.embed.weight
    assert whole.nbytes == made.base_nbytes == 4 * (50 * 16 + 4 * 4 + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": None}, "bits=None"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 2.5}, "bits=2.5"),
        ({"bits": 0}, "bits=0"),
        ({"bits": 4.0}, "bits=4.0"),
        ({"bits": True}, "bits=True"),
        ({"bits": 3, "base_bits": 16}, "base_bits=16"),
    ],
)
def test_options_out_of_range_are_refused(base, options, message):
    with pytest.raises(ConfigurationError, match=message):
        coin.compress(base, base, **options)
    with pytest.raises(ConfigurationError, match=message):
        Compression.of(options)


def test_no_base_another_architecture_and_a_nan_are_refused(base):
    with pytest.raises(ConfigurationError, match="no base"):
        coin.compress(base, None, bits=3)
    with pytest.raises(StateError, match=r"packed already, expected a plain network"):
        coin.compress(coin.compress(base, None, bits=3, base_bits=0).packed(), None, bits=3, base_bits=0)
    other = build_network(NetworkConfig("small_resnet", image_size=16, options={"width": 4}), 6)
    with pytest.raises(StateError, match="shape"):
        coin.compress(base, other, bits=3)
    with pytest.raises(ConfigurationError, match=r"found .*bas_bits.*, expected bits and base_bits$"):
        Compression.of({"bits": 3, "bas_bits": 8})
    for half, types in ((near(base).bfloat16(), "torch.bfloat16"), (near(base).double(), "torch.float64")):
        with pytest.raises(StateError, match=rf"is {types}, in the base torch.float32, expected one type"):
            coin.compress(half, base, bits=3)
        made = coin.compress(half, copy.deepcopy(base).to(half.fc.weight.dtype), bits=3).network()
        assert made.fc.weight.dtype == half.fc.weight.dtype
    broken = near(base)
    broken.fc.bias.data[0] = torch.nan
    with pytest.raises(StateError, match=r"fc\.bias"):
        coin.compress(broken, base, bits=3)
    for base_bits in (32, 8):
        with pytest.raises(StateError, match=r"the base .*fc\.bias"):
            coin.compress(base, broken, bits=3, base_bits=base_bits)


def test_files_of_another_base_and_of_whole_networks_are_refused(base, tmp_path):
    path = tmp_path / "x.safetensors"
    coin.compress(near(base), base, bits=3).save(path)
    with pytest.raises(FileError, match="from the base"):
        coin.Compressed.load(path, near(base))
    save_network(path, base, CONFIG, 6, {})
    with pytest.raises(FileError, match="no compressed network"):
        coin.Compressed.load(path, base)


def test_a_network_like_it_but_of_other_widths_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    coin.compress(nn.Linear(64, 32), None, bits=3, base_bits=0).save(path)
    for other in (nn.Linear(62, 32), nn.Linear(66, 32), nn.Linear(64, 31)):
        with pytest.raises(StateError, match="are not those of a Linear; give a network of its architecture"):
            coin.Compressed.load(path, other)


def test_a_file_of_folded_batchnorms_leaves_the_network_that_it_is_read_with_unmarked(base, tmp_path):
    body = copy.deepcopy(base)
    mark_folded(body, {"stem.1": "stem.0.weight"})
    coin.compress(body, None, bits=3, base_bits=0).save(tmp_path / "x.safetensors")
    again = coin.Compressed.load(tmp_path / "x.safetensors", base)
    assert folded_norms(again.base) == {"stem.1": "stem.0.weight"}
    assert folded_norms(base) == {}


@pytest.mark.parametrize("base_bits", [32, 8, 0])
def test_a_compressed_file_is_read_like_any_network_s_beside_its_base(base, base_bits, tmp_path):
    save_network(tmp_path / "base.safetensors", base, CONFIG, 6, {})
    network = near(base)
    (tmp_path / "replicas").mkdir()
    paths = [tmp_path / f"replicas/{task}.safetensors" for task in "ab"]
    for path in paths:
        compression = Compression(bits=3, base_bits=base_bits)
        made = coin.compress(network, base, bits=3, base_bits=base_bits)
        save_compressed(path, made, CONFIG, 6, tmp_path / "base.safetensors", compression, {"label": "x"})
    files = [load_network(path) for path in paths]
    assert same(files[0].network, coin.compress(network, base, bits=3, base_bits=base_bits).network())
    assert files[0].provenance["label"] == "x"
    if base_bits == 8:  # the bytes on disk are those that are told
        on_disk = sum(path.stat().st_size for path in (tmp_path / "replicas").iterdir())
        assert on_disk == pytest.approx(nbytes_together(files), rel=0.5)
    whole = sum(tensor.nbytes for tensor in network.state_dict().values())
    module = files[0].module()
    if base_bits:  # a delta is a whole network once it is loaded
        assert resident_nbytes(module) == whole
    else:
        working = 4 * max(kept.shape.numel() for _, _, kept in kept_parameters(module.body))
        assert resident_nbytes(module) == sum(tensor.nbytes for tensor in module.state_dict().values()) + working
        assert resident_nbytes(module) < 0.6 * whole
    # Without its base it says what is missing; beside it it is found by its name.
    if base_bits == 32:
        (tmp_path / "base.safetensors").rename(tmp_path / "replicas/base.safetensors")
        assert same(load_network(paths[0]).network, files[0].network)
        (tmp_path / "replicas/base.safetensors").unlink()
        with pytest.raises(CoinError, match="put it there"):
            load_network(paths[0])


def test_compressing_into_what_it_reads_is_refused(base, tmp_path, capsys):
    save_network(tmp_path / "network.safetensors", near(base), CONFIG, 6, {})
    path = str(tmp_path / "network.safetensors")
    assert main(["compress", path, f"--base={path}", "--bits=3", f"--output={path}"]) == 2
    assert "expected another file" in capsys.readouterr().err


def test_every_entry_of_a_buffer_is_kept():
    network = nn.BatchNorm1d(4).eval()
    network.running_var.copy_(torch.tensor([1e-9, 1e-5, 1e-3, 1.0]))
    read = coin.compress(network, None, bits=4, base_bits=0).network()
    torch.testing.assert_close(read.running_var, network.running_var, rtol=1e-3, atol=0)
