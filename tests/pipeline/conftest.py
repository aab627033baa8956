"""Every command runs in a folder of its own."""

import pytest

import coin.pipeline.run


@pytest.fixture(autouse=True)
def own_folder(elsewhere: None) -> None:
    """See `elsewhere`."""


@pytest.fixture
def no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the reports, whose plots take longer than what the test is about."""
    monkeypatch.setattr(coin.pipeline.run, "write_report", lambda folders: None)
