"""W&B without the user's settings."""

import os

import pytest
import wandb


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def online(monkeypatch):
    """Ask for online mode; W&B reads its environment once per process, so make it forget before and after."""
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield
    wandb.teardown()
