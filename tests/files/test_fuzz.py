"""Configurations and checkpoints of random bytes and random damage: a `CoinError` or a result, never anything else.

A plain run of the tests looks at a handful. ``COIN_FUZZ_SECONDS=300 pytest tests/files/test_fuzz.py`` (``make fuzz``)
gives every test so many seconds.
"""

import json
import os
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save

from coin.errors import CoinError
from coin.files.safetensors import load_provenance, load_state
from coin.files.yaml import read_yaml
from coin.networks import NetworkConfig, build_network, load_network, read_weights
from coin.pipeline.sweep import read_sweep, sweep_points
from coin.reporting.results import read_document, read_results
from coin.reporting.sweeps import read_sweep_table
from coin.statistics.files import open_statistic

SECONDS = float(os.environ.get("COIN_FUZZ_SECONDS", "0"))
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
ROUND = settings(max_examples=25, derandomize=SECONDS == 0, **QUIET)


def for_a_while(test: Callable[[], None]) -> None:
    end = time.monotonic() + SECONDS
    test()
    while time.monotonic() < end:
        test()


def survives(read: Callable[[], Any]) -> None:
    """Run something that may refuse, in one line, and may do nothing else wrong."""
    told = "one line"
    try:
        read()
    except CoinError as error:
        told = str(error)
    assert len(told.splitlines()) == 1, told


def network_file() -> bytes:
    config = NetworkConfig("small_resnet", 16, None, {"width": 4})
    made = {"network": {"name": "small_resnet", "image_size": 16, "options": {"width": 4}}, "num_classes": 3}
    state = {name: value.contiguous() for name, value in build_network(config, 3).state_dict().items()}
    return save(state, {"coin": json.dumps(made)})


WHOLE = network_file()
HEADER = 8 + struct.unpack("<Q", WHOLE[:8])[0]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A network's file, cut off and with some bytes changed, most of them in its header."""
    content = bytearray(WHOLE)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, HEADER - 1) | st.integers(0, len(content) - 1))
        content[place] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.just(len(content)) | st.integers(0, len(content)))])


def described(network: Any, num_classes: Any, rest: dict[str, Any]) -> bytes:
    made = rest | {"network": network, "num_classes": num_classes}
    return save({"fc.bias": torch.zeros(3)}, {"coin": json.dumps(made)})


NETWORKS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["small_resnet", "small_vit", "resnet18", "minilm", "../x", ""]) | JSON,
        "image_size": st.integers(-2, 64) | JSON,
        "options": st.dictionaries(st.sampled_from(["width", "depth", "heads", "patch", "x"]), JSON, max_size=2) | JSON,
        "weights": st.sampled_from([None, "IMAGENET1K_V1"]) | JSON,
    },
)


@pytest.fixture
def path() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "file"


def test_damaged_networks(path: Path) -> None:
    @ROUND
    @given(damaged())
    def test(content: bytes) -> None:
        file = path.with_suffix(".safetensors")
        file.write_bytes(content)
        for read in (load_network, load_state, load_provenance, read_weights):
            survives(lambda read=read: read(file))
        survives(lambda: open_statistic(file, statistic="fisher"))

    for_a_while(test)


def test_networks_that_say_something_else(path: Path) -> None:
    @ROUND
    @given(NETWORKS | JSON, st.integers(-3, 10**12) | JSON, st.dictionaries(st.text(max_size=5), JSON, max_size=2))
    def test(network: Any, num_classes: Any, rest: dict[str, Any]) -> None:
        path.write_bytes(described(network, num_classes, rest))
        survives(lambda: load_network(path))

    for_a_while(test)


def test_random_results(path: Path) -> None:
    @ROUND
    @given(st.binary(max_size=100) | st.text(max_size=100).map(str.encode) | JSON.map(lambda x: json.dumps(x).encode()))
    def test(content: bytes) -> None:
        for name in ("results.csv", "results.json", "sweep.csv"):
            (path.parent / name).write_bytes(content)
        for read in (read_results, read_document, read_sweep_table):
            survives(lambda read=read: read(path.parent))

    for_a_while(test)


YAML = st.text(st.sampled_from("ab:{}[]!|>-\n \t\"'#,0123.%@"), max_size=60) | JSON.map(json.dumps)
SWEEPS = st.fixed_dictionaries(
    {"experiment": st.just("x.yaml") | JSON, "grid": JSON | st.dictionaries(
        st.text(max_size=8), st.lists(JSON, max_size=3) | JSON, max_size=2)},
    optional={"name": JSON, "set": JSON | st.dictionaries(st.text(max_size=8), JSON, max_size=2)},
)  # fmt: skip


def test_random_yaml_and_sweeps(path: Path) -> None:
    @ROUND
    @given(YAML | SWEEPS.map(json.dumps))
    def test(text: str) -> None:
        path.write_text(text)
        survives(lambda: read_yaml(path))
        survives(lambda: sweep_points(read_sweep(path), path.parent))

    for_a_while(test)
