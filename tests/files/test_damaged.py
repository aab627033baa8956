"""Files that are cut off, tampered with or something else: each ends in one line that says what to do."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from coin.errors import CoinError, FileError
from coin.files.yaml import read_yaml
from coin.networks import load_network, read_weights
from coin.statistics import Sums
from coin.statistics.files import open_statistic, save_statistic

pytestmark = pytest.mark.usefixtures("elsewhere")


def cut(share):
    """Return what keeps a share of a file's bytes."""

    def damage(path):
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return damage


def rewrite(path, **values):
    """Change what a file says of itself."""
    with safe_open(path, "pt") as file:
        made = json.loads(file.metadata()["coin"])
    save_file(load_file(path), path, {"coin": json.dumps(made | values)})


def named(text):
    """Return what gives a file these metadata."""
    return lambda path: save_file(load_file(path), path, text)


def check_refused(read, path, message):
    with pytest.raises(CoinError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def network(write_experts):
    return Path(write_experts([3])["task0"])


DAMAGES = {
    "missing": (Path.unlink, "found no file"),
    "cut in its header": (cut(0.001), "not a whole safetensors file"),
    "cut in its tensors": (cut(0.5), "not a whole .*; make it again"),
    "without metadata": (named(None), "does not say what made it"),
    "metadata that are no JSON": (named({"coin": "{"}), "does not say what made it"),
    "metadata that are a list": (named({"coin": "[]"}), "holds no network"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_file_that_is_no_whole_network(case, network):
    damage, message = DAMAGES[case]
    damage(network)
    check_refused(load_network, network, message)


SMALL = {"name": "small_resnet", "image_size": 16, "options": {"width": 4}}
SAID = {
    "no network": ({"network": None}, "holds no network"),
    "a name that is a list": ({"network": SMALL | {"name": ["a"]}}, "holds no network"),
    "an unknown architecture": ({"network": SMALL | {"name": "resnet5"}}, "resnet5"),
    "an entry too many": ({"network": SMALL | {"path": "../x"}}, "holds no network"),
    "an option too many": ({"network": SMALL | {"options": {"depth": 3}}}, "depth"),
    "a number that is a word": ({"num_classes": "ten"}, "holds no network"),
    "no classes": ({"num_classes": 0}, "num_classes=0"),
    "other classes": ({"num_classes": 4}, "another number of classes"),
    "another width": ({"network": SMALL | {"options": {"width": 8}}}, "another architecture"),
    "an architecture of more tensors": (
        {"network": {"name": "resnet18"}},
        "has no tensor 'bn1.bias' .* it is of another architecture",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_a_network_that_is_not_what_it_says(case, network):
    values, message = SAID[case]
    rewrite(network, **values)
    check_refused(load_network, network, message)


class Unpickled:
    """A pickle that makes a file where it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


WEIGHTS = {
    "missing": (lambda path: None, "found no file"),
    "a pickle": (
        lambda path: torch.save({"state_dict": Unpickled()}, path),
        "cannot read .* as a network's weights .Weights only load failed., expected tensors by name",
    ),
    "another pickle": (
        lambda path: path.write_bytes(pickle.dumps(Unpickled())),
        "cannot read .* expected tensors by name",
    ),
    "no dictionary": (lambda path: torch.save(torch.ones(3), path), "cannot read"),
    "no tensors": (
        lambda path: torch.save({"state_dict": {"a": 1}}, path),
        "not all values are tensors",
    ),
    "empty": (Path.touch, "cannot read"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_checkpoint_that_is_none(case):
    path = Path("weights.ckpt")
    write, message = WEIGHTS[case]
    write(path)
    check_refused(read_weights, path, message)
    assert not Path("unpickled").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"statistic": "gram"}, "holds gram, expected fisher"),
        ({"weights": None}, "of weights None…, expected 0{12}…: .* run coin fisher again"),
    ],
)
def test_a_statistic_that_is_not_of_its_expert(values, message):
    path = Path("a.fisher.safetensors")
    network = torch.nn.ParameterDict({"a": torch.ones(3)})
    save_statistic(path, Sums({"a": torch.ones(3)}, 2, 4.0), network)
    rewrite(path, **values)
    with pytest.raises(FileError, match=message):
        open_statistic(path, statistic="fisher", weights="0" * 64)


YAMLS = {
    b"a: [0]\nb: x\na: [1]\n": r"cannot use 'x.yaml' as YAML: found key 'a' twice in line 3",
    b"name: [x\n": "as YAML: .* line 2",
    b"\x89PNG\xff\xfe\x00": "as YAML: .utf-8. codec",
    b"name: 2020-13-45\n": "as YAML: month must be in",
    b"[" * 1000: "as YAML: maximum recursion",
}


@pytest.mark.parametrize("text", YAMLS, ids=YAMLS.values())
def test_yaml_that_says_nothing_clear(text):
    path = Path("x.yaml")
    path.write_bytes(text)
    check_refused(read_yaml, path, YAMLS[text])


def test_aliases_merges_and_plain_values_are_read():
    path = Path("x.yaml")
    path.write_text("a: &a {lr: 0.1, epochs: 2}\nb: {<<: *a, lr: 0.2}\nc: [*a, *a]\n")
    first = {"lr": 0.1, "epochs": 2}
    assert read_yaml(path) == {"a": first, "b": first | {"lr": 0.2}, "c": [first, first]}


def test_what_is_torn_in_a_finished_step_says_which_folder_to_delete(tmp_path):
    step = tmp_path / "experts/digits"
    step.mkdir(parents=True)
    (step / "done.json").touch()
    (step / "initial.safetensors").write_bytes(b"12")
    with pytest.raises(FileError) as caught:
        read_weights(step / "initial.safetensors")
    assert str(caught.value).endswith(f"; delete its step's folder '{step}' and run again")
