"""``coin serve``: the system it makes of an experiment, its mistakes, and on Ray Serve, where that is installed."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import coin
from coin.cli import main
from coin.coding import Promise
from coin.commands.serve import application, read_system
from coin.errors import ConfigurationError, FileError
from coin.reporting import read_results
from coin.reporting.results import requested_policy
from coin.serving.front_end import FrontEnd, Limits
from coin.serving.policies import PolicyKind
from coin.serving.servers import Reply, System
from tests.pipeline.conftest import tasks_of
from tests.serving.conftest import ask_all, ask_one


def read(folder: Path, policy: str | None = None, decoder: str | None = "feature_ridge", method: str = "coin") -> System:
    return read_system(str(folder), method, decoder, policy and PolicyKind(policy), 0.9)[0]


@pytest.fixture(scope="session")
def alone(finished: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment, evaluated with decoders that read no survivor beside one that does."""
    output = tmp_path_factory.mktemp("alone")
    decoders = "[linear, expert_head, {kind: feature_ridge, survivors: false}]"
    methods = "[{class_path: Coin, init_args: {compress: {bits: 8}}}]"
    options = [f"--output={output}", f"--decoders={decoders}", f"--methods={methods}"]
    assert main(["run", "-c", str(config), *options]) == 0
    return output / "tiny"
