from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coin.errors import FileError, StateError
from coin.networks import (
    Compression,
    NetworkConfig,
    build_network,
    files,
    load_network,
    save_network,
)
from coin.networks.files import import_checkpoint, initial_network
from coin.pipeline.steps.merge import compress_file


@pytest.fixture
def saved(tmp_path, write_experts):
    return Path(write_experts([3])["task0"])


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_a_network_file_gives_back_the_network(tmp_path, small_config, images):
    network = build_network(small_config, 5, seed=9).train()
    network(images)
    save_network(tmp_path / "net.safetensors", network, small_config, 5, {"task": "letters"})
    file = load_network(tmp_path / "net.safetensors")
    assert same(file.network.state_dict(), network.state_dict())
    assert file.config.described() == small_config.described()
    assert (file.num_classes, file.provenance["task"]) == (5, "letters")
    assert not file.network.training
    assert torch.equal(file.network(images), network.eval()(images))


def test_reading_a_file_of_pretrained_weights_downloads_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("downloads")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    config = NetworkConfig("shufflenet_v2_x0_5", 32, "IMAGENET1K_V1")
    network = build_network(replace(config, weights=None), 3)
    save_network(tmp_path / "net.safetensors", network, config, 3, {})
    assert same(
        load_network(tmp_path / "net.safetensors").network.state_dict(), network.state_dict()
    )


@pytest.mark.parametrize("prefix", ["", "network.", "module.", "net._orig_mod."])
@pytest.mark.parametrize("key", ["state_dict", "model", None])
def test_what_stands_before_all_names_is_dropped(small_config, tmp_path, prefix, key):
    network = build_network(small_config, 3, seed=4)
    state = {prefix + name: value for name, value in network.state_dict().items()}
    state |= {"loss.scale": torch.ones(1)} if prefix else {}
    path = tmp_path / ("expert.pt" if key else "expert.safetensors")
    torch.save({key: state, "epoch": 3}, path) if key else save_file(state, path)
    assert same(import_checkpoint(small_config, 3, path).state_dict(), network.state_dict())
    assert import_checkpoint(small_config, 5, path, seed=0).fc.out_features == 5
    del state[f"{prefix}fc.bias"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(StateError, match="has no tensor '"):
        import_checkpoint(small_config, 3, tmp_path / "part.safetensors")


def test_a_checkpoint_of_two_networks_is_refused(small_config, tmp_path):
    state = build_network(small_config, 3).state_dict()
    torch.save({"model": state, "state_dict": state}, tmp_path / "two.pt")
    with pytest.raises(FileError, match="it has both 'state_dict' and 'model': save one of them"):
        import_checkpoint(small_config, 3, tmp_path / "two.pt")


def test_adapters_beside_the_weights_are_refused_with_the_line_that_merges_them(
    small_config, tmp_path
):
    state = build_network(small_config, 3).state_dict() | {
        "fc.lora_A.default.weight": torch.ones(2, 2)
    }
    save_file(state, tmp_path / "adapted.safetensors")
    with pytest.raises(
        FileError, match=r"holds LoRA adapters .*; save what peft's merge_and_unload\(\) returns"
    ):
        import_checkpoint(small_config, 3, tmp_path / "adapted.safetensors")


def test_the_base_checkpoints_head_is_kept_when_the_class_counts_agree(small_config, saved):
    wanted = load_network(saved).network.state_dict()
    assert same(initial_network(small_config, 3, saved, seed=50).state_dict(), wanted)
    assert same(import_checkpoint(small_config, 3, saved).state_dict(), wanted)
    with pytest.raises(StateError, match=r"fc\.weight"):
        import_checkpoint(small_config, 6, saved)


def test_otherwise_all_experts_share_the_seeds_fresh_head(small_config, saved):
    seeded = initial_network(small_config, 3, None, seed=7).state_dict()
    assert same(seeded, build_network(small_config, 3, seed=7).state_dict())
    base = load_network(saved).network.state_dict()
    first, second, other = (
        initial_network(small_config, 6, saved, seed=seed).state_dict() for seed in (5, 5, 6)
    )
    assert same(first, second)
    assert first["fc.weight"].std() < 0.02  # its constructor draws up to 1/√F
    assert torch.equal(first["fc.bias"], torch.zeros(6))
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
    body = [name for name in base if not name.startswith("fc.")]
    assert all(torch.equal(first[name], base[name]) for name in body)


@pytest.mark.parametrize("base", [False, True])
def test_fewer_classes_start_from_the_first_rows_of_the_widest_head(
    small_config, saved, tmp_path, base
):
    checkpoint = saved if base else None
    wide = initial_network(small_config, 6, checkpoint, seed=5)
    save_network(tmp_path / "wide.safetensors", wide, small_config, 6, {})
    fewer = initial_network(
        small_config, 2, checkpoint, seed=5, wider=tmp_path / "wide.safetensors"
    ).state_dict()
    for name, tensor in wide.state_dict().items():
        assert torch.equal(fewer[name], tensor[:2] if name.startswith("fc.") else tensor)


@pytest.mark.parametrize("base_bits", [8, 32])
def test_the_base_of_several_copies_is_built_once_and_again_where_its_file_changes(
    write_experts, tmp_path, monkeypatch, base_bits
):
    built = []

    def building(*args, **options):
        built.append(args)
        return build_network(*args, **options)

    base, *experts = map(Path, write_experts([3, 3, 3, 3]).values())
    copies = [tmp_path / f"copy{place}.safetensors" for place in range(3)]

    def open_all():
        return [load_network(path).network.state_dict() for path in copies]

    for expert, path in zip(experts, copies, strict=True):
        compress_file(expert, path, base, Compression(3, base_bits))
    first = open_all()
    monkeypatch.setattr("coin.networks.files.build_network", building)
    files._read_base.cache_clear()
    assert all(map(same, open_all(), first))
    assert len(built) == 1
    again = load_network(experts[0]).network
    with torch.no_grad():
        again.get_parameter("fc.weight").add_(1)
    kept = next(tmp_path.glob("*-int8.safetensors")) if base_bits == 8 else base
    save_network(kept, again, load_network(base).config, 3, {})
    with pytest.raises(FileError, match="is a delta from the base"):
        open_all()
