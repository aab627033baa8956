"""One network's training as a step of an experiment, killed and started again."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from coin.callbacks import ExpertExport, Weights
from coin.files.safetensors import load_state
from coin.modules import Expert
from coin.pipeline.config import ExpertConfig
from coin.pipeline.steps.train import TrainNetwork
from coin.tracking.runs import RunLog


class KilledError(Exception):
    pass


@pytest.fixture
def train(tmp_path, synthetic, small_config):
    """Return a function that trains an expert for four epochs of four steps each."""

    def run(folder, weights):
        step = TrainNetwork(
            name="expert",
            store=tmp_path / folder,
            config={"seed": 3},
            network=small_config,
            recipe=ExpertConfig(epochs=4, lr=0.05, batch_size=8, weights=weights),
            tasks={"mine": synthetic()},
            trainer={"accelerator": "cpu", "num_sanity_val_steps": 0},
            log=RunLog(tmp_path / folder, "group", "expert", "name", (), {}),
        )
        step.run()
        return load_state(step.output)[0]

    return run


KILLS = [
    (Weights.last, 10, range(8, 16)),  # in the middle of the third epoch
    (Weights.best, 10, range(8, 16)),
    (Weights.last, 16, range(0)),  # before the expert is written
]


@pytest.mark.parametrize(("weights", "last_step", "repeated"), KILLS)
def test_a_killed_training_goes_on_from_its_last_whole_epoch_to_where_an_undisturbed_one_ends(
    weights, last_step, repeated, train, tmp_path, monkeypatch
):
    taken = []
    kills = []
    training_step = Expert.training_step
    on_train_end = ExpertExport.on_train_end

    def noted(module, batch, batch_idx):
        if module.global_step in kills:
            raise KilledError
        taken.append(module.global_step)
        return training_step(module, batch, batch_idx)

    def exported(export, trainer, module):
        if module.global_step in kills:
            raise KilledError
        on_train_end(export, trainer, module)

    monkeypatch.setattr(Expert, "training_step", noted)
    monkeypatch.setattr(ExpertExport, "on_train_end", exported)
    expected = train("undisturbed", weights)
    # A process that is killed does not save on its way out.
    monkeypatch.setattr(ModelCheckpoint, "on_exception", lambda *_: None)
    kills.append(last_step)
    with pytest.raises(KilledError):
        train("killed", weights)
    kills.clear()
    taken.clear()
    found = train("killed", weights)
    assert taken == [*repeated]
    assert all(found[name].equal(value) for name, value in expected.items())
    kept = 1 if weights is Weights.last else 2
    assert len(list((tmp_path / "killed").glob("*/checkpoints/*.ckpt"))) == kept
