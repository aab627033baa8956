"""Many experts merged from files: the same coded models as from memory, with few tensors alive."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coin.coding import Code
from coin.commands.merge import merge
from coin.files.safetensors import StateFile, load_state, save_state
from coin.files.tensors import fingerprint
from coin.merging import Coin, MergeMethod, RegMean, merge_networks
from coin.networks import BatchNormPolicy, load_network
from coin.statistics import fisher_diagonal, gram_sums

pytestmark = pytest.mark.slow

ROWS = [[0.1, 0.2, 0.1, 0.3, 0.1, 0.2]]
METHODS = [Coin(batchnorm=BatchNormPolicy.average), RegMean(batchnorm=BatchNormPolicy.average)]


@pytest.fixture
def files(
    write_experts: Callable[..., dict[str, str]], tmp_path: Path
) -> dict[str, dict[str, Path]]:
    """Six experts with statistics of their own, as `coin merge` is given them."""
    found: dict[str, dict[str, Path]] = {"experts": {}, "fisher": {}, "gram": {}}
    for task, place in write_experts([3] * 6).items():
        network = load_network(Path(place)).network
        inputs = torch.randn(5, 3, 16, 16)
        values = {
            "fisher": fisher_diagonal(network, [inputs]),
            "gram": gram_sums(network, [inputs]).mean(),
        }
        made = {"weights": fingerprint(network.state_dict()), "data": "own", "samples": 5}
        made |= {"kind": "exact", "seconds": 0.0, "passes": 0.0}
        found["experts"][task] = Path(place)
        for name, value in values.items():
            found[name][task] = tmp_path / f"{task}.{name}.safetensors"
            save_state(found[name][task], value, {"statistic": name, **made})
    return found


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_merge_from_files_is_that_from_memory_and_keeps_few_tensors(
    method: MergeMethod, files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = [load_network(path).network for path in files["experts"].values()]
    fishers, grams = (
        [load_state(path)[0] for path in files[name].values()] for name in ("fisher", "gram")
    )
    (expected,) = merge_networks(method, networks, Code(ROWS), fishers=fishers, grams=grams)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts = []
    read = StateFile.__getitem__

    def counted(self: StateFile, name: str) -> Tensor:
        tensor = read(self, name)
        alive.add(tensor)
        counts.append(len(alive))
        return tensor

    monkeypatch.setattr(StateFile, "__getitem__", counted)
    (path,) = merge(method=method, output=tmp_path / "coded", code=ROWS, **files)
    assert len(counts) > 6 * 20
    assert max(counts) <= 4
    found, _ = load_state(path)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
