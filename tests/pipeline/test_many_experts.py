"""Many experts merged from files: the same coded models as from memory, with few tensors alive and one network."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import coin.merging.expert_sources
from coin.coding import Code
from coin.commands.merge import merge
from coin.files.safetensors import StateFile, load_state, save_state
from coin.files.tensors import fingerprint
from coin.merging import Average, Coin, MergeMethod, RegMean, merge_networks
from coin.networks import (
    BatchNormPolicy,
    NetworkConfig,
    build_network,
    load_network,
    pad_head,
    save_network,
)
from coin.networks.heads import padded_state
from coin.statistics import fisher_diagonal, gram_sums

pytestmark = pytest.mark.slow

COUNTS = [3, 2, 3, 3, 2, 3]
ROWS = [[0.1, 0.2, 0.1, 0.3, 0.1, 0.2]]
METHODS = [method(batchnorm=BatchNormPolicy.average) for method in (Average, Coin, RegMean)]


@pytest.fixture
def files(
    write_experts: Callable[..., dict[str, str]], small_config: NetworkConfig, tmp_path: Path
) -> dict[str, Any]:
    """Experts with statistics of their own, and a shared initialisation, as `coin merge` is given them."""
    experts = {task: Path(path) for task, path in write_experts(COUNTS).items()}
    fisher, gram = {}, {}
    for index, (task, path) in enumerate(experts.items()):
        network = load_network(path).network
        inputs = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(index))
        made = {
            "weights": fingerprint(network.state_dict()),
            "data": "own",
            "samples": 5,
            "seconds": 0.0,
            "passes": 0.0,
        }
        fisher[task], gram[task] = (
            tmp_path / f"{task}.{name}.safetensors" for name in ("fisher", "gram")
        )
        values = fisher_diagonal(network, [inputs], kind="categorical")
        save_state(fisher[task], values, {"statistic": "fisher", "kind": "categorical", **made})
        save_state(gram[task], gram_sums(network, [inputs]).mean(), {"statistic": "gram", **made})
    initial = tmp_path / "initial.safetensors"
    save_network(
        initial, build_network(small_config, 3, seed=9), small_config, 3, {"made_by": "a test"}
    )
    return {"experts": experts, "fisher": fisher, "gram": gram, "initial": initial}


class Living:
    """Counts the objects that are alive, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = self.ever = 0

    def born(self, thing: Any) -> None:
        self.now, self.ever = self.now + 1, self.ever + 1
        self.most = max(self.most, self.now)
        weakref.finalize(thing, self._gone)

    def _gone(self) -> None:
        self.now -= 1


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_a_merge_from_files_keeps_few_tensors_and_one_network(
    method: MergeMethod, files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = [load_network(path) for path in files["experts"].values()]
    networks = [pad_head(file.network, 3) for file in loaded]
    fishers = [load_state(path)[0] for path in files["fisher"].values()]
    wanted = merge_networks(
        method,
        networks,
        Code(ROWS),
        fishers=[padded_state(state, "fc", 3) for state in fishers],
        grams=[load_state(path)[0] for path in files["gram"].values()],
        initial=load_network(files["initial"]).network,
    )[0]
    del loaded, networks, fishers
    gc.collect()

    tensors, built = Living(), Living()
    plain_read, plain_build = StateFile.__getitem__, build_network

    def read(self: StateFile, name: str) -> Tensor:
        tensor = plain_read(self, name)
        tensors.born(tensor)
        return tensor

    def build(*arguments: Any, **options: Any) -> nn.Module:
        network = plain_build(*arguments, **options)
        built.born(network)
        gc.collect()  # modules are in reference cycles
        return network

    monkeypatch.setattr(StateFile, "__getitem__", read)
    monkeypatch.setattr(coin.merging.expert_sources, "build_network", build)
    (path,) = merge(method=method, output=tmp_path / "coded", code=ROWS, **files)
    assert tensors.ever > len(COUNTS) * 20, "nothing was counted"
    assert tensors.most <= 4
    assert built.most <= 2
    found, provenance = load_state(path)
    assert provenance["class_counts"] == COUNTS
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
