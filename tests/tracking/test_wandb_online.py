"""Commands that are to log online and cannot, W&B's failure at the very end, and the loggers that ship."""

from pathlib import Path

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from coin.cli import main
from coin.data.tasks import Tasks
from coin.errors import CoinWarning
from coin.modules import DecodingEvaluator
from coin.reporting import read_results
from coin.tracking.settings import run_environment

CONFIGS = Path(__file__).parents[2] / "configs"
TASKS = "{task0: {class_path: Digits}, task1: {class_path: Glyphs, init_args: {classes: A-F}}}"
FIT = ["fit", "-c", str(CONFIGS / "expert/mnist5k.yaml")]
RUN = ["run", "--name=x", f"--tasks={TASKS}", "--methods=[{class_path: Average}]"]


@pytest.mark.usefixtures("online", "elsewhere")
@pytest.mark.parametrize("command", [RUN, FIT])
def test_a_command_that_cannot_log_online_says_so_before_it_writes(command, capsys):
    assert main(command) == 2
    expected = "coin: error: W&B is to work online, but there is no W&B API key; run `wandb login`"
    assert expected in capsys.readouterr().err
    assert not Path("runs").exists()


def test_results_stand_where_w_and_b_fails_at_the_very_end(
    synthetic, write_experts, write_coded, make_trainer, tmp_path, monkeypatch
):
    def broken(*_, **__):
        raise BrokenPipeError("the service is gone")

    experts = write_experts([3, 2])
    tasks = Tasks({"task0": synthetic(3), "task1": synthetic(2)}, 20)
    evaluator = DecodingEvaluator(experts, write_coded([[0.5, 0.5]], experts))
    monkeypatch.setattr(wandb.Run, "log", broken)
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda *_, **__: None)
    with run_environment(tmp_path), wandb.init(project="p", dir=str(tmp_path)) as run:
        trainer = make_trainer(logger=WandbLogger(experiment=run))
        message = "W&B did not take the evaluation .BrokenPipeError: the service is"
        with pytest.warns(CoinWarning, match=message):
            measured = trainer.evaluate(evaluator, tasks)
    assert len(read_results(tmp_path / "run")) == len(measured) > 0


SHORT = """--model.options={"width":4} --model.image_size=16 --data.image_size=16 --trainer.callbacks=[]
    --trainer.max_epochs=1 --trainer.limit_train_batches=2 --trainer.limit_val_batches=1
    --trainer.enable_progress_bar=false --trainer.enable_checkpointing=false"""


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", ["csv", "wandb"])
def test_shipped_loggers_log_a_training_run(name, read_wandb):
    assert main([*FIT, "-c", str(CONFIGS / f"logger/{name}.yaml"), *SHORT.split()]) == 0
    if wandb.run is not None:
        wandb.run.finish()
    (metrics,) = Path("runs").rglob("metrics.csv")
    assert "val/accuracy" in metrics.read_text(encoding="utf-8").splitlines()[0]
    folders = list(Path("runs").rglob("offline-run-*"))
    assert len(folders) == (name == "wandb")
    for folder in folders:
        records = read_wandb(folder)
        axes = [record["metric"] for record in records if record["type"] == "metric"]
        assert {"name": "val/accuracy", "step_metric": "epoch"}.items() <= axes[-1].items()
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        assert any("val/accuracy" in row and row["epoch"] == 0 for row in rows)
