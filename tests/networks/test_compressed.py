"""Compressed networks: in few bits alone or as deltas from a base, in memory, in files of their own and beside it."""

from copy import deepcopy

import pytest
import torch
from closeness import check_equal
from torch import nn

import coin
from coin.cli import main
from coin.errors import CoinError, ConfigurationError, FileError, StateError
from coin.files.safetensors import StateFile
from coin.networks import Compression, NetworkConfig, build_network, pad_head
from coin.networks.adapted import resident_nbytes, stored_nbytes
from coin.networks.batchnorm import folded_norms, mark_folded
from coin.networks.files import load_network, nbytes_together, save_compressed, save_network

CONFIG = NetworkConfig("small_resnet", image_size=16, options={"width": 8})


class Tied(nn.Module):
    """A tied weight, a mask with infinities, a buffer that is in no state, and a single number."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.out = nn.Linear(16, 50, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("places", torch.arange(4)[None], persistent=False)
        self.scale = nn.Parameter(torch.tensor(2.0))


def near(network):
    """Return a fine-tuned copy: every floating tensor a little off, BatchNorm's counters on."""
    torch.manual_seed(1)
    other = deepcopy(network)
    for tensor in other.state_dict().values():
        is_real = tensor.is_floating_point()
        tensor.add_(0.003 * torch.randn_like(tensor) if is_real else 5)
    return other


@pytest.fixture
def base():
    return build_network(CONFIG, 6).eval()


BUILDS = {"ResNet": lambda: build_network(CONFIG, 6).eval(), "tied": lambda: Tied().eval()}
LOST = {1: 0.7, 3: 0.25, 8: 0.01}  # of a matrix at most, by bits
KEPT = {32: 1.0, 8: 0.28, 0: 0.0}  # of the base's bytes, by its bits


@torch.no_grad()
@pytest.mark.parametrize("base_bits", KEPT)
@pytest.mark.parametrize("bits", LOST)
@pytest.mark.parametrize("build", BUILDS)
def test_a_compressed_network_is_near_and_is_read_back(build, bits, base_bits, tmp_path):
    base = BUILDS[build]()
    network = near(base)
    made = coin.compress(network, base if base_bits else None, base_bits=base_bits, bits=bits)
    made.save(tmp_path / "x")
    again = coin.Compressed.load(tmp_path / "x", base)
    check_equal(again.network(), made.network())
    in_file = sum(tensor.nbytes for tensor in StateFile(tmp_path / "x").values())
    assert again.nbytes == made.nbytes == in_file
    expected = KEPT[base_bits] * stored_nbytes(base)
    assert again.base_nbytes == made.base_nbytes == pytest.approx(expected, rel=0.15)
    for name, tensor in made.network().state_dict().items():
        own = network.state_dict()[name]
        start = base.state_dict()[name] if base_bits == 32 else torch.zeros_like(own)
        if own.ndim > 1 and name != "mask":  # in few bits: beside what is rounded
            assert (tensor - own).norm() < LOST[bits] * (own - start).norm()
        else:  # in 16 bits, or whole
            torch.testing.assert_close(tensor, own, rtol=2e-3, atol=1e-4)


def test_what_equals_its_base_takes_nothing(base):
    made = coin.compress(deepcopy(base), base, bits=3)
    assert made.nbytes == 0
    check_equal(made.network(), base)


@pytest.mark.parametrize("classes", [4, 9])
def test_heads_of_other_class_counts_are_deltas_from_the_rows_that_are_there(
    base, classes, tmp_path
):
    network = pad_head(near(base), classes)
    nn.init.normal_(network.fc.weight)
    made = coin.compress(network, base, bits=8)
    made.save(tmp_path / "x.safetensors")
    torch.testing.assert_close(made.network().fc.weight, network.fc.weight, rtol=0, atol=0.02)
    check_equal(coin.Compressed.load(tmp_path / "x.safetensors", base).network(), made.network())


def test_tied_weights_are_kept_once_and_stay_tied():
    base = Tied()
    made = coin.compress(near(base), base, bits=8)
    read = made.network()
    assert read.out.weight is read.embed.weight
    assert made.nbytes <= 50 * 16 + 2 * 50 + 4 * 4 * 4 + 4
    assert made.base_nbytes == 4 * (50 * 16 + 4 * 4 + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_is_of_its_base_s_type(base, dtype):
    network = near(base).to(dtype)
    with pytest.raises(StateError, match=rf"is {dtype}, in the base torch.float32, expected one"):
        coin.compress(network, base, bits=3)
    read = coin.compress(network, base.to(dtype), bits=3).network()
    assert read.fc.weight.dtype == dtype


WRONG = {
    "found bits=9": {"bits": 9},
    "found bits=2.5": {"bits": 2.5},
    "found bits=True": {"bits": True},
    "found base_bits=16": {"bits": 3, "base_bits": 16},
    "found .*bas_bits.*, expected bits and base_bits$": {"bits": 3, "bas_bits": 8},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_are_refused(message):
    with pytest.raises(ConfigurationError, match=message):
        Compression.of(WRONG[message])


def broken(network):
    network.fc.bias.data[0] = torch.nan
    return network


def narrower():
    return build_network(NetworkConfig("small_resnet", image_size=16, options={"width": 4}), 6)


def packed(network):
    return coin.compress(network, None, bits=3, base_bits=0).packed()


REFUSED = {
    "no base": lambda base: (base, None),
    "packed already, expected a plain network": lambda base: (packed(base), base),
    "of shape": lambda base: (base, narrower()),
    "the network to compress .*fc.bias": lambda base: (broken(near(base)), base),
    "the base .*fc.bias": lambda base: (near(base), broken(base)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_compressed_is_refused(base, message):
    network, start = REFUSED[message](base)
    with pytest.raises(CoinError, match=message):
        coin.compress(network, start, bits=3)


def test_a_file_of_a_whole_network_or_of_one_of_another_width_is_refused(base, tmp_path):
    save_network(tmp_path / "whole", base, CONFIG, 6, {})
    with pytest.raises(FileError, match="no compressed network"):
        coin.Compressed.load(tmp_path / "whole", base)
    coin.compress(nn.Linear(63, 32), None, bits=3, base_bits=0).save(tmp_path / "x")
    with pytest.raises(StateError, match="are not those of a Linear; give a network of its"):
        coin.Compressed.load(tmp_path / "x", nn.Linear(62, 32))  # of as many bytes


def test_a_file_of_folded_batchnorms_leaves_the_network_that_it_is_read_with_unmarked(
    base, tmp_path
):
    norms = {"stem.1": "stem.0.weight"}
    body = deepcopy(base)
    mark_folded(body, norms)
    coin.compress(body, None, bits=3, base_bits=0).save(tmp_path / "x")
    again = coin.Compressed.load(tmp_path / "x", base)
    assert folded_norms(again.base) == norms
    assert folded_norms(base) == {}


@pytest.fixture
def write_copies(base, tmp_path):
    """Write two compressed networks in a folder beside their base's file; return these, opened."""

    def write(base_bits):
        base_file = tmp_path / "base.safetensors"
        save_network(base_file, base, CONFIG, 6, {})
        how = Compression(3, base_bits)
        made = coin.compress(near(base), base, bits=3, base_bits=base_bits)
        files = []
        for name in "ab":
            path = tmp_path / f"copies/{name}.safetensors"
            save_compressed(path, made, CONFIG, 6, base_file, how, {"label": name})
            files.append(load_network(path))
        check_equal(files[0].network, made.network())
        return files

    return write


@pytest.mark.parametrize(("base_bits", "count"), [(32, 2), (8, 3)])
def test_a_delta_s_file_is_a_whole_network_once_it_is_loaded(write_copies, base, base_bits, count):
    files = write_copies(base_bits)
    assert [file.provenance["label"] for file in files] == ["a", "b"]
    assert resident_nbytes(files[0].module()) == stored_nbytes(base)
    assert nbytes_together(files) == files[0].base_nbytes + 2 * files[0].nbytes
    assert len(list(files[0].path.parent.iterdir())) == count  # a base in 8 bits is beside them


def test_a_network_alone_stays_packed(write_copies, base):
    file, _ = write_copies(0)
    module = file.module()
    held = sum(tensor.nbytes for tensor in module.state_dict().values())
    largest = max(tensor.nbytes for tensor in base.parameters())
    assert resident_nbytes(module) == held + largest < 0.6 * stored_nbytes(base)


def test_a_base_is_found_beside_its_delta_or_its_place_is_said(write_copies, base, tmp_path):
    file, _ = write_copies(32)
    moved = tmp_path / "copies/base.safetensors"
    (tmp_path / "base.safetensors").rename(moved)
    check_equal(load_network(file.path).network, file.network)
    save_network(moved, near(base), CONFIG, 6, {})
    with pytest.raises(FileError, match="is a delta from the base"):
        load_network(file.path)
    moved.unlink()
    with pytest.raises(FileError, match="put it there"):
        load_network(file.path)


def test_compressing_into_what_it_reads_is_refused(base, tmp_path, capsys):
    path = tmp_path / "network.safetensors"
    save_network(path, base, CONFIG, 6, {})
    assert main(["compress", f"{path}", f"--base={path}", "--bits=3", f"--output={path}"]) == 2
    assert "expected another file" in capsys.readouterr().err


def test_every_entry_of_a_buffer_is_kept():
    network = nn.BatchNorm1d(4).eval()
    network.running_var.copy_(torch.tensor([1e-9, 1e-5, 1e-3, 1.0]))
    read = coin.compress(network, None, bits=4, base_bits=0).network()
    torch.testing.assert_close(read.running_var, network.running_var, rtol=1e-3, atol=0)
