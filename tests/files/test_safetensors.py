"""Tensors read from a file as they are asked for: what is handed out, what is kept, what is refused."""

import gc
from pathlib import Path

import pytest
import torch

import coin.files.safetensors
from coin.errors import FileError
from coin.files.safetensors import StateFile, load_state, save_state


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with six tensors of 4,000 bytes each."""
    path = tmp_path / "state.safetensors"
    draw = torch.Generator().manual_seed(0)
    save_state(path, {f"layer{i}.weight": torch.randn(10, 100, generator=draw) for i in range(6)}, {"made_by": "test"})
    return path


def test_it_holds_what_load_state_reads(path: Path) -> None:
    wanted, provenance = load_state(path)
    state = StateFile(path)
    assert list(state) == list(wanted)
    assert len(state) == 6
    assert state.provenance == provenance
    assert all(state[name].equal(tensor) for name, tensor in wanted.items())
    chosen = StateFile(path, ["layer4.weight", "layer1.weight"])
    assert next(iter(chosen.values())).equal(wanted["layer4.weight"])
    assert "layer0.weight" not in chosen
    with pytest.raises(KeyError):
        chosen["layer0.weight"]


def mapped_kib(path: Path) -> int:
    """Return how much of a file this process has in memory, over all its mappings."""
    total, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="smaps is Linux's")
def test_what_was_read_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.safetensors"
    save_state(path, {f"layer{i}.weight": torch.ones(512, 512) for i in range(16)}, {})  # one MiB each
    monkeypatch.setattr(coin.files.safetensors, "_MAPPED", 2**20 - 1)
    state = StateFile(path)
    peak = 0
    for tensor in state.values():
        tensor.sum()
        peak = max(peak, mapped_kib(path))
    del tensor
    gc.collect()
    assert 1024 <= peak < 3 * 1024
    assert mapped_kib(path) == 0
    everything = list(state.values())
    assert sum(float(tensor.sum()) for tensor in everything) == 16 * 512 * 512
    assert mapped_kib(path) >= 15 * 1024, "the measure sees what is kept"


def test_a_file_that_changes_while_it_is_read_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coin.files.safetensors, "_MAPPED", 4000 - 1)
    state = StateFile(path)
    before = state["layer0.weight"]
    kept = before.clone()
    save_state(path, {name: tensor + 1 for name, tensor in load_state(path)[0].items()}, {"made_by": "test"})
    assert before.equal(kept), "what was handed out stays as it was"
    with pytest.raises(FileError, match="has changed while it was read"):
        state["layer1.weight"]
    path.unlink()
    with pytest.raises(FileError, match="found no file"):
        state["layer1.weight"]


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"is not a whole safetensors file|does not say what made it") as caught:
        StateFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
