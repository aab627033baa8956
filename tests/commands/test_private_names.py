"""What ``coin`` takes of other packages that they do not promise to keep: named here, so that an upgrade says so."""

import inspect
from typing import Any

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.utils._pytree import tree_leaves, tree_map

from coin.commands.trainer import TrainerCLI


def test_one_private_method_is_overridden() -> None:
    private = {name for name in vars(TrainerCLI) if name.startswith("_") and not name.startswith("__")}
    own = {name for name in private if hasattr(LightningCLI, name)}
    assert own == {"_parse_ckpt_path"}  # Lightning would replace a model's options by a checkpoint's, in fit too
    assert callable(LightningCLI._parse_ckpt_path)
    assert "self._parse_ckpt_path()" in inspect.getsource(LightningCLI.__init__)


def test_private_names_that_are_read(make_trainer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    assert trainer._accelerator_connector.cluster_environment is None or trainer.num_nodes == 1
    assert callable(_SubprocessScriptLauncher.launch)
    assert tree_map(str, {"a": [1, (2,)]}) == {"a": ["1", ("2",)]}
    assert tree_leaves({"a": [1, (2,)]}) == [1, 2]
    logger = WandbLogger(save_dir=tmp_path, offline=True, mode="offline")
    assert (logger._offline, logger._wandb_init["mode"]) == (True, "offline")
