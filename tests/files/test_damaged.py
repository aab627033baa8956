"""Files that are cut off, tampered with or something else: each ends in one line that says what to do."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from coin.errors import CoinError, FileError
from coin.evaluation.variants import read_coded
from coin.files.tensors import fingerprint
from coin.files.yaml import read_yaml
from coin.networks import load_network, read_weights
from coin.reporting import read_results
from coin.reporting.results import COLUMNS, RESULTS_CSV, RESULTS_JSON, read_document
from coin.statistics import Sums
from coin.statistics.files import check_statistic, open_statistic, save_statistic
from coin.statistics.statistic import StatisticKind

pytestmark = pytest.mark.usefixtures("elsewhere")
Damage = Callable[[Path], None]


class Unpickled:
    """A pickle that makes a file where it is loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def cut(share: float) -> Damage:
    return lambda path: (
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)]) and None
    )


def said(**values: Any) -> Damage:
    """Change what a file says of itself; none takes an entry away."""

    def damage(path: Path) -> None:
        with safe_open(path, "pt") as file:
            made = json.loads(file.metadata()["coin"])
        made = {name: value for name, value in (made | values).items() if value is not None}
        save_file(load_file(path), path, {"coin": json.dumps(made)})

    return damage


def held(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def damage(path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(change(load_file(path)), path, metadata)

    return damage


def small(name: str = "small_resnet", **options: Any) -> dict[str, Any]:
    return {"name": name, "image_size": 16, "options": options}


NETWORKS: dict[str, tuple[Damage, str]] = {
    "missing": (Path.unlink, "found no file"),
    "empty": (lambda path: path.write_bytes(b"") and None, "not a whole safetensors file"),
    "cut in its header": (cut(0.001), "not a whole safetensors file"),
    "cut in its tensors": (cut(0.5), "not a whole .*; make it again"),
    "a text": (lambda path: path.write_text("weights") and None, "not a whole safetensors file"),
    "a checkpoint": (
        lambda path: torch.save({"a": torch.ones(2)}, path),
        "not a whole safetensors file",
    ),
    "without metadata": (
        lambda path: save_file(load_file(path), path),
        "does not say what made it",
    ),
    "metadata that are no JSON": (
        lambda path: save_file(load_file(path), path, {"coin": "{"}),
        "not say what made it",
    ),
    "metadata that are a list": (
        lambda path: save_file(load_file(path), path, {"coin": "[]"}),
        "holds no network",
    ),
    "of no network": (said(network=None), "holds no network"),
    "a network that is a list": (said(network=[1]), "holds no network"),
    "an unknown architecture": (said(network=small("resnet5")), "resnet5"),
    "a name that is a list": (
        said(network=small() | {"name": ["small_resnet"]}),
        "holds no network",
    ),
    "an image size that is a word": (
        said(network=small() | {"image_size": "big"}),
        "image_size='big'",
    ),
    "an option that is none": (said(network=small(depth=3)), "depth"),
    "a width that is a word": (said(network=small(width="wide")), "cannot build small_resnet"),
    "an entry too many": (said(network=small(width=4) | {"path": "../x"}), "holds no network"),
    "a number of classes that is a word": (said(num_classes="ten"), "holds no network"),
    "no classes": (said(num_classes=0), "num_classes=0"),
    "another number of classes": (said(num_classes=4), "another number of classes"),
    "another architecture": (said(network=small("small_vit")), "another architecture"),
    "a tensor too few": (
        held(lambda state: {k: v for k, v in state.items() if k != "fc.bias"}),
        "no tensor 'fc.bias'",
    ),
    "a tensor too many": (held(lambda state: state | {"extra": torch.ones(2)}), "'extra' too many"),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_a_network_that_is_not_what_it_says(
    case: str, write_experts: Callable[..., dict[str, str]]
) -> None:
    path = Path(write_experts([3])["task0"])
    damage, message = NETWORKS[case]
    damage(path)
    with pytest.raises(CoinError, match=message) as caught:
        load_network(path)
    assert "\n" not in str(caught.value)


WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "found no file"),
    "a pickle": (
        lambda path: torch.save({"state_dict": Unpickled()}, path),
        "cannot read .* as a network's weights .Weights only load failed., expected tensors by name",
    ),
    "another pickle": (
        lambda path: path.write_bytes(pickle.dumps(Unpickled())),
        "cannot read .* expected tensors by name",
    ),
    "cut": (lambda path: [torch.save({"a": torch.ones(999)}, path), cut(0.2)(path)], "cannot read"),
    "no dictionary": (lambda path: torch.save(torch.ones(3), path), "cannot read"),
    "no tensors": (
        lambda path: torch.save({"state_dict": {"a": 1}}, path),
        "not all values are tensors",
    ),
    "a text": (lambda path: path.write_text("weights"), "cannot read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot read"),
    "a folder": (Path.mkdir, "found no file"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_checkpoint_that_is_none(case: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    write, message = WEIGHTS[case]
    write(path)
    with pytest.raises(FileError, match=message) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "unpickled").exists()


def negative(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: -value for name, value in state.items()}


STATISTICS: dict[str, tuple[Damage, str]] = {
    "cut": (cut(0.7), "not a whole safetensors file"),
    "of other weights": (
        said(weights="0" * 64),
        r"of weights 000000000000…, expected .* run coin fisher again",
    ),
    "of no weights": (said(weights=None), "of weights None"),
    "of weights that are a number": (said(weights=3), "of weights 3"),
    "another statistic": (said(statistic="gram"), "holds gram, expected fisher"),
    "negative": (held(negative), "negative in 'a', expected mean squares"),
    "a NaN": (held(lambda state: {"a": state["a"] * torch.nan}), "not finite: tensor 'a'"),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_a_statistic_that_is_not_of_its_expert(case: str, tmp_path: Path) -> None:
    path = tmp_path / "a.fisher.safetensors"
    network = torch.nn.ParameterDict({"a": torch.ones(3)})
    weights = fingerprint(network.state_dict())
    save_statistic(path, Sums({"a": torch.ones(3)}, 2, 4.0), network, seconds=1.0)
    assert open_statistic(path, statistic="fisher", weights=weights).provenance["samples"] == 2
    damage, message = STATISTICS[case]
    damage(path)
    with pytest.raises(CoinError, match=message):
        check_statistic(
            StatisticKind.fisher, open_statistic(path, statistic="fisher", weights=weights), network
        )


CODED: dict[str, tuple[Damage, str]] = {
    "an expert": (said(code=None), "no coded model"),
    "a code that does not sum to 1": (said(code=[[0.9, 0.9]]), "1.8"),
    "a negative weight": (said(code=[[1.5, -0.5]]), "-0.5"),
    "a row that the code has not": (said(row=4), r"found rows \[4\]"),
    "no experts": (said(experts=None), "no coded model"),
    "other experts": (said(experts=["0", "1"]), "made from other experts"),
}


@pytest.mark.parametrize("case", CODED)
def test_a_coded_model_that_says_something_else(
    case: str, write_experts: Callable[..., dict[str, str]], write_coded: Callable[..., list[str]]
) -> None:
    experts = write_experts([3, 2])
    (path,) = (Path(name) for name in write_coded([[0.5, 0.5]], experts))
    fingerprints = [
        fingerprint(load_network(Path(name)).network.state_dict()) for name in experts.values()
    ]
    damage, message = CODED[case]
    damage(path)
    with pytest.raises(CoinError, match=message):
        read_coded([path], fingerprints)


YAMLS: dict[str, tuple[bytes, str]] = {
    "a key twice": (
        b"a: [0]\nb: x\na: [1]\n",
        r"cannot use '.*x.yaml' as YAML: found key 'a' twice in line 3",
    ),
    "a nested key twice": (b"a:\n  b: 1\n  b: 2\n", "found key 'b' twice"),
    "no YAML": (b"name: [x\n", "as YAML: .* line 2"),
    "no text": (b"\x89PNG\xff\xfe\x00", "as YAML: .utf-8. codec"),
    "a tab": (b"a:\n\tb: 1\n", "as YAML: .* line 2"),
    "a date that is none": (b"name: 2020-13-45\n", "month must be in"),
    "no end of brackets": (b"[" * 5000, "as YAML: maximum recursion"),
}


@pytest.mark.parametrize("case", YAMLS)
def test_yaml_that_says_nothing_clear(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    text, message = YAMLS[case]
    path.write_bytes(text)
    with pytest.raises(CoinError, match=message) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_aliases_merges_and_plain_values_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "a: &a {lr: 0.1, epochs: 2}\nb: {<<: *a, lr: 0.2}\nc: [*a, *a]\n"
    )
    first = {"lr": 0.1, "epochs": 2}
    assert read_yaml(tmp_path / "x.yaml") == {
        "a": first,
        "b": first | {"lr": 0.2},
        "c": [first, first],
    }


VALUES = dict.fromkeys(COLUMNS, "0.5") | {
    "experiment": "e",
    "seed": "0",
    "samples_per_task": "9",
    "code_row": "0",
}
ROW = f"{','.join(COLUMNS)}\n{','.join(VALUES[name] for name in COLUMNS)}\n"


RESULTS: dict[str, tuple[str, bytes, Callable[[Path], Any], str]] = {
    "rows: none": (RESULTS_CSV, b"", read_results, "cannot be read as CSV"),
    "rows: cut": (RESULTS_CSV, ROW.encode()[:-60], read_results, "damaged|has no column"),
    "rows: no text": (
        RESULTS_CSV,
        b"\xff\xfe\x00\x01",
        read_results,
        "cannot be read|has no column",
    ),
    "document: cut": (RESULTS_JSON, b'{"rows": [', read_document, "cannot be read as JSON"),
}


@pytest.mark.parametrize("case", RESULTS)
def test_results_that_are_damaged(case: str, tmp_path: Path) -> None:
    name, content, read, message = RESULTS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_torn_in_a_finished_step_says_which_folder_to_delete(tmp_path: Path) -> None:
    step = tmp_path / "experts/digits"
    step.mkdir(parents=True)
    (step / "done.json").write_text("")
    (step / "initial.safetensors").write_bytes(b"12")
    (step / RESULTS_JSON).write_text("{")
    told = f"; delete its step's folder '{step}' and run again"
    for read in (lambda: read_weights(step / "initial.safetensors"), lambda: read_document(step)):
        with pytest.raises(FileError) as caught:
            read()
        assert str(caught.value).endswith(told)
