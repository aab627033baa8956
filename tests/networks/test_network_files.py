"""Networks as files, and experts' start and weights from checkpoints of others."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closeness import check_equal
from safetensors.torch import save_file

from coin.errors import CoinError, StateError
from coin.networks import NetworkConfig, build_network, load_network, pad_head, save_network
from coin.networks.adapted import stored_nbytes
from coin.networks.files import import_checkpoint, initial_network


@pytest.fixture
def saved(write_experts):
    return Path(write_experts([3])["task0"])


def test_a_network_file_gives_back_the_network(tmp_path, small_config):
    network = build_network(small_config, 5, seed=9).train()
    network(torch.randn(4, 3, 16, 16))
    save_network(tmp_path / "net", network, small_config, 5, {"task": "letters"})
    file = load_network(tmp_path / "net")
    check_equal(file.network, network)
    assert file.nbytes == stored_nbytes(network)
    assert not file.network.training
    assert file.config.described() == small_config.described()
    assert (file.num_classes, file.provenance["task"]) == (5, "letters")


def test_reading_a_file_of_pretrained_weights_downloads_nothing(tmp_path, monkeypatch):
    config = NetworkConfig("shufflenet_v2_x0_5", 32, "IMAGENET1K_V1")
    network = build_network(replace(config, weights=None), 3)
    save_network(tmp_path / "net.safetensors", network, config, 3, {})
    monkeypatch.delattr("torchvision.models._api.load_state_dict_from_url")
    check_equal(load_network(tmp_path / "net.safetensors").network, network)


@pytest.mark.parametrize("prefix", ["", "network.", "module.", "net._orig_mod."])
@pytest.mark.parametrize("key", ["state_dict", "model", None])
def test_what_stands_before_all_names_is_dropped(small_config, tmp_path, prefix, key):
    network = build_network(small_config, 3, seed=4)
    state = {prefix + name: value for name, value in network.state_dict().items()}
    if prefix:
        state["loss.scale"] = torch.ones(1)
    path = tmp_path / "expert.safetensors"
    if key:
        path = tmp_path / "expert.pt"
        torch.save({key: state, "epoch": 3}, path)
    else:
        save_file(state, path)
    check_equal(import_checkpoint(small_config, 3, path), network)
    assert import_checkpoint(small_config, 5, path, seed=0).fc.out_features == 5


REFUSED = {
    "it has both 'state_dict' and 'model': save one": lambda state: {
        "model": state,
        "state_dict": state,
    },
    r"holds LoRA adapters .*; save what peft's merge_and_unload\(\) returns": lambda state: (
        state | {"fc.lora_A.default.weight": torch.ones(2, 2)}
    ),
    "has no tensor 'fc.bias'": lambda state: {
        f"module.{name}": value for name, value in state.items() if name != "fc.bias"
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_one_network_s_whole_weights_is_refused(small_config, tmp_path, message):
    state = build_network(small_config, 3).state_dict()
    torch.save(REFUSED[message](state), tmp_path / "wrong.pt")
    with pytest.raises(CoinError, match=message):
        import_checkpoint(small_config, 3, tmp_path / "wrong.pt")


def test_the_base_checkpoint_s_head_is_kept_when_the_class_counts_agree(small_config, saved):
    expected = load_network(saved).network
    check_equal(initial_network(small_config, 3, saved, seed=50), expected)
    check_equal(import_checkpoint(small_config, 3, saved), expected)
    with pytest.raises(StateError, match=r"fc\.weight"):
        import_checkpoint(small_config, 6, saved)


def test_otherwise_all_experts_share_the_seed_s_fresh_head(small_config, saved):
    seeded = initial_network(small_config, 3, None, seed=7)
    check_equal(seeded, build_network(small_config, 3, seed=7))
    base = load_network(saved).network
    first, second, other = (initial_network(small_config, 6, saved, seed=n) for n in (5, 5, 6))
    check_equal(first, second)
    assert not torch.equal(first.fc.weight, other.fc.weight)
    first.fc = base.fc
    check_equal(first, base)


@pytest.mark.parametrize("has_base", [False, True])
def test_fewer_classes_start_from_the_first_rows_of_the_widest_head(
    small_config, saved, tmp_path, has_base
):
    checkpoint = saved if has_base else None
    wider = tmp_path / "wide.safetensors"
    expected = initial_network(small_config, 6, checkpoint, seed=5)
    save_network(wider, expected, small_config, 6, {})
    fewer = initial_network(small_config, 2, checkpoint, seed=5, wider=wider)
    check_equal(fewer, pad_head(expected, 2))
