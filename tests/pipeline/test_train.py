"""One network's training as a step of an experiment, killed and started again."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from coin.callbacks import Weights
from coin.data import TaskData
from coin.files.safetensors import load_state
from coin.modules import Expert
from coin.networks import NetworkConfig
from coin.pipeline.config import ExpertConfig
from coin.pipeline.steps.train import TrainNetwork
from coin.tracking.runs import RunLog


class KilledError(Exception):
    pass


@pytest.mark.parametrize("weights", Weights)
def test_a_killed_training_goes_on_from_its_last_whole_epoch_to_where_an_undisturbed_one_ends(
    weights: Weights,
    tmp_path: Path,
    synthetic: Any,
    small_config: NetworkConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four steps an epoch; killed in the middle of the third epoch."""
    taken: list[int] = []
    kill_at: list[int] = []
    plain = Expert.training_step

    def noted(self: Expert, batch: Any, batch_idx: int) -> Any:
        taken.append(self.global_step)
        if self.global_step in kill_at:
            raise KilledError
        return plain(self, batch, batch_idx)

    def train(folder: str) -> dict[str, Any]:
        taken.clear()
        task: TaskData = synthetic()
        step = TrainNetwork(
            name="expert",
            store=tmp_path / folder,
            config={"seed": 3},
            network=small_config,
            recipe=ExpertConfig(epochs=4, lr=0.05, batch_size=8, weights=weights),
            tasks={"mine": task},
            trainer={"accelerator": "cpu", "num_sanity_val_steps": 0},
            log=RunLog(tmp_path / folder, "group", "expert", "name", (), {}),
        )
        step.run()
        return dict(load_state(step.output)[0])

    monkeypatch.setattr(Expert, "training_step", noted)
    wanted = train("undisturbed")
    assert taken == list(range(16))
    kill_at.append(10)
    # A process that is killed does not save on its way out.
    monkeypatch.setattr(ModelCheckpoint, "on_exception", lambda *_: None)
    with pytest.raises(KilledError):
        train("killed")
    kill_at.clear()
    found = train("killed")
    assert taken == list(range(8, 16))
    assert all(found[name].equal(wanted[name]) for name in wanted)
    last = 1 if weights is Weights.last else 2
    assert len(list((tmp_path / "killed").glob("*/checkpoints/*.ckpt"))) == last
