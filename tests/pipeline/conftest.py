"""Every command runs in a folder of its own."""

import shutil
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import coin.pipeline.steps.report
from coin.cli import main


@pytest.fixture(autouse=True)
def own_folder(elsewhere):
    """See `elsewhere`."""


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished experiment with its steps, below `tmp_path`, that a test may change."""
    for name in (finished.name, ".steps"):
        left_out = shutil.ignore_patterns("wandb")
        shutil.copytree(finished.parent / name, tmp_path / name, symlinks=True, ignore=left_out)
    return tmp_path / finished.name


@pytest.fixture
def no_reports(monkeypatch):
    """Leave out the reports, whose plots take longer than what the test is about."""
    monkeypatch.setattr(coin.pipeline.steps.report, "write_report", lambda folder: None)


@pytest.fixture
def write_tokenizer():
    """Return a function that writes a tokenizer of words, and of two special tokens before them."""

    def write(path, words):
        places = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *words])}
        tokenizer = Tokenizer(WordLevel(places, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(path)

    return write


@pytest.fixture
def trained(finished):
    """The sections that bring the finished experiment's experts along."""
    experts = f"{finished}/seed-0/experts"
    return f"""
expert:
  checkpoints:
    digits: {experts}/digits/expert.safetensors
    letters: {experts}/letters/expert.safetensors
base: {{checkpoint: {finished}/base/base.safetensors}}
"""


@pytest.fixture
def run(config, tmp_path):
    """Return a function that runs the small experiment with options below `tmp_path`, and returns the status."""
    return lambda *options: main(["run", "-c", str(config), f"--output={tmp_path}", *options])


@pytest.fixture
def run_small(config, tmp_path, monkeypatch):
    """Return a function that runs the small experiment with other sections, and returns its seed's folder."""
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def run(sections):
        document = yaml.safe_load(config.read_text()) | yaml.safe_load(sections)
        Path("options.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
        assert main(["run", "-c", "options.yaml", f"--output={tmp_path}"]) == 0
        return tmp_path / "tiny/seed-0"

    return run
