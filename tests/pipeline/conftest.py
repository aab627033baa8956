"""Every command runs in a folder of its own."""

import shutil
from pathlib import Path

import pytest

import coin.pipeline.run


@pytest.fixture(autouse=True)
def own_folder(elsewhere: None) -> None:
    """See `elsewhere`."""


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished experiment with its steps, below `tmp_path`, that a test may change."""
    for name in (finished.name, ".steps"):
        left_out = shutil.ignore_patterns("wandb")
        shutil.copytree(finished.parent / name, tmp_path / name, symlinks=True, ignore=left_out)
    return tmp_path / finished.name


@pytest.fixture
def no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the reports, whose plots take longer than what the test is about."""
    monkeypatch.setattr(coin.pipeline.run, "write_report", lambda folder: None)
