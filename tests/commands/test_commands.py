"""The commands one by one, in-process, and the line that each mistake gets."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from coin.cli import main
from coin.files.safetensors import load_provenance, load_state
from coin.reporting import read_results

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.enable_model_summary=false"]
DIGITS = ["--data=Digits", "--data.max_train=120", "--data.max_test=77", "--data.image_size=16"]
LETTERS = ["--data=Glyphs", "--data.classes=A-F", "--data.train_per_class=30", "--data.test_per_class=9"]
LETTERS += ["--data.image_size=16"]
TASKS = (
    "{digits: {class_path: Digits, init_args: {max_train: 120, max_test: 77, image_size: 16}},"
    " letters: {class_path: Glyphs, init_args:"
    " {classes: A-F, train_per_class: 30, test_per_class: 9, image_size: 16}}}"
)
CALLBACKS = ["--trainer.callbacks+=ExpertExport", "--trainer.callbacks+=FisherEstimator"]
CALLBACKS += ["--trainer.callbacks.init_args.samples_per_task=24"]
CALIBRATION = [f"--tasks={TASKS}", "--samples_per_task=24", "--batch_size=16"]
NETWORK = ["--model=Expert", "--model.network=small_resnet", "--model.options={width: 4}", "--model.image_size=16"]


def experts_of(folder: Path) -> str:
    return f"{{digits: {folder}/digits/expert.safetensors, letters: {folder}/letters/expert.safetensors}}"


def fishers_of(folder: Path) -> str:
    return f"{{digits: {folder}/digits/expert.fisher.safetensors, letters: {folder}/letters/expert.fisher.safetensors}}"


@pytest.fixture(scope="module")
def route(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same experiment step by step: ``coin fit`` twice with the callbacks."""
    folder = tmp_path_factory.mktemp("route")
    for name, data, classes in (("digits", DIGITS, 10), ("letters", LETTERS, 6)):
        model = [*NETWORK, "--model.lr=0.02", f"--model.initial={finished}/base/initial-{classes}.safetensors"]
        trainer = ["--trainer.max_epochs=2", f"--trainer.default_root_dir={folder / name}", *CALLBACKS, *QUIET]
        assert main(["fit", *model, *data, "--data.batch_size=32", *trainer]) == 0
    return folder


def test_fit_gives_the_experts_of_the_run(route: Path, finished: Path) -> None:
    for task in ("digits", "letters"):
        own, provenance = load_state(route / task / "expert.safetensors")
        wanted, _ = load_state(finished / "seed-0/experts" / task / "expert.safetensors")
        assert all(own[name].equal(wanted[name]) for name in wanted)
        assert provenance["network"]["name"] == "small_resnet"


def test_merge_and_evaluate_give_the_numbers_of_the_run(
    route: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coded = route / "coded"
    shared = [f"--experts={experts_of(route)}", "--code=[[0.4, 0.6]]", f"--output={coded}", *CALIBRATION]
    assert main(["merge", *shared, "--method=Average"]) == 0
    assert main(["merge", *shared, "--method=Coin", f"--fisher={fishers_of(route)}"]) == 0
    recalibrated = ["--method=Coin", "--method.batchnorm=recalibrate", f"--fisher={fishers_of(route)}"]
    assert main(["merge", *shared, *recalibrated]) == 0
    files = f"[{coded}/average.safetensors, {coded}/coin.safetensors, {coded}/coin-recalibrate.safetensors]"
    model = ["--model=DecodingEvaluator", f"--model.experts={experts_of(route)}", f"--model.coded={files}"]
    data = ["--data=Tasks", f"--data.tasks={TASKS}", "--data.samples_per_task=24", "--data.batch_size=16"]
    assert main(["evaluate", *model, *data, f"--output={route / 'results'}", *QUIET]) == 0
    said = capsys.readouterr().out
    line = said.splitlines()[-1]
    results = route / "results"
    assert line == f"measured; wrote {results}/results.csv"
    assert "report:" not in said
    keys = ["method", "batchnorm", "decoder", "task"]
    own = read_results(route / "results").set_index(keys)
    own_heads = own.index.get_level_values("decoder") == "expert_head"  # of all kinds, the default
    assert own_heads.any()
    own = own[~own_heads]
    wanted = read_results(finished / "seed-0").set_index(keys).loc[own.index]
    columns = ["expert_accuracy", "decoded_accuracy", "nda", "agreement", "samples_per_task", "merge_passes"]
    pd.testing.assert_frame_equal(own[columns], wanted[columns])
    # The Fisher of the callback and of the run differ by rounding: other batches.
    pd.testing.assert_series_equal(own.residual, wanted.residual, rtol=1e-5)


@pytest.mark.slow
def test_a_merge_without_tasks_warns_in_one_line_and_averages_the_statistics(finished: Path, tmp_path: Path) -> None:
    command = ["merge", f"--experts={experts_of(finished / 'seed-0/experts')}", "--code=[[0.4, 0.6]]"]
    done = subprocess.run(
        [sys.executable, "-m", "coin", *command, "--method=Average", f"--output={tmp_path}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stderr.startswith("coin: warning: found no calibration inputs, needed by method 'average' to choose")
    assert done.stderr.count("\n") == 1
    assert done.stdout == f"{tmp_path / 'average.safetensors'}\n"
    made = load_provenance(tmp_path / "average.safetensors")
    assert (made["batchnorm"], made["chosen"], made["passes"]) == ("auto", {"batchnorm": "average"}, 0)
    buffers, _ = load_state(tmp_path / "average.safetensors")
    paths = (finished / f"seed-0/experts/{task}/expert.safetensors" for task in ("digits", "letters"))
    digits, letters = (load_state(path)[0] for path in paths)
    name = "stem.1.running_var"
    torch.testing.assert_close(buffers[name], 0.4 * digits[name] + 0.6 * letters[name])


def test_a_merge_with_tasks_records_what_it_chose(finished: Path, tmp_path: Path) -> None:
    command = ["merge", f"--experts={experts_of(finished / 'seed-0/experts')}", "--code=[[0.4, 0.6]]"]
    assert main([*command, "--method=Average", f"--output={tmp_path}", *CALIBRATION]) == 0
    chosen = load_provenance(tmp_path / "average.safetensors")["chosen"]
    residuals = chosen["held_out_residual"]
    assert set(residuals) == {"average", "recalibrate"}
    assert chosen["batchnorm"] == min(residuals, key=residuals.__getitem__)
    assert chosen == load_provenance(finished / "seed-0/coded/average.safetensors")["chosen"]


def test_a_method_of_fishers_refuses_none_and_those_of_other_data_or_weights(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits, letters = (f"{finished}/seed-0/statistics/{task}.fisher.safetensors" for task in ("digits", "letters"))
    own, swapped = (f"--fisher={{digits: {a}, letters: {b}}}" for a, b in ((digits, letters), (letters, digits)))
    command = ["merge", f"--experts={experts_of(finished / 'seed-0/experts')}", f"--output={tmp_path}"]
    command += ["--method=Coin", "--method.batchnorm=average"]
    for options, message in (
        ([own, "--method.fisher_data=pooled"], "found no Fisher (exact, pooled) of expert 'digits'"),
        ([swapped], "run coin fisher again"),
        ([], "fisher"),
    ):
        capsys.readouterr()
        assert main([*command, *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("coin: error: ")
        assert message in line
        assert not list(tmp_path.iterdir())
    assert main([*command, own, "--method.fisher_data=own"]) == 0


def test_fisher_command_is_the_callback(route: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expert = route / "digits" / "expert.safetensors"
    command = ["fisher", f"--ckpt_path={expert}", *DIGITS, "--samples_per_task=24", f"--output={tmp_path}", *QUIET]
    assert main(command) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith(f"; wrote {tmp_path / 'expert.fisher.safetensors'}")
    own, provenance = load_state(tmp_path / "expert.fisher.safetensors")
    wanted, written = load_state(route / "digits" / "expert.fisher.safetensors")
    for name in wanted:
        assert own[name].sub(wanted[name]).abs().max() <= 1e-6 * wanted[name].abs().max()
    assert provenance["weights"] == written["weights"]
    assert provenance["samples"] == 24


def test_lightning_checkpoints_are_tested_and_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"--trainer.default_root_dir={tmp_path}"
    assert main(["fit", *NETWORK, *DIGITS, "--trainer.max_epochs=1", root, *QUIET]) == 0
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    # The architecture comes from the checkpoint: the defaults would be a ResNet50.
    assert main(["test", f"--ckpt_path={checkpoint}", *DIGITS, root, *QUIET]) == 0
    assert "test/accuracy" in capsys.readouterr().out
    assert main(["validate", f"--ckpt_path={checkpoint}", *DIGITS, root, *QUIET]) == 0
    assert main(["predict", f"--ckpt_path={checkpoint}", *DIGITS, root, *QUIET]) == 0
    assert main(["fisher", f"--ckpt_path={checkpoint}", "--samples_per_task=5", *DIGITS, *QUIET]) == 0
    assert load_provenance(checkpoint.parent / "expert.fisher.safetensors")["samples"] == 5


def test_commands_take_the_image_size_of_the_experts(route: Path, tmp_path: Path) -> None:
    expert = route / "digits" / "expert.safetensors"
    data = ["--data=Digits", "--data.max_train=120", "--samples_per_task=24"]  # 32 pixels; the expert's are 16
    assert main(["fisher", f"--ckpt_path={expert}", *data, f"--output={tmp_path}", *QUIET]) == 0
    own, _ = load_state(tmp_path / "expert.fisher.safetensors")
    wanted, _ = load_state(route / "digits" / "expert.fisher.safetensors")
    assert all(own[name].sub(wanted[name]).abs().max() <= 1e-6 * wanted[name].abs().max() for name in wanted)


def test_gram_files_for_regmean(route: Path, tmp_path: Path) -> None:
    for name, data in (("digits", DIGITS), ("letters", LETTERS)):
        command = ["fisher", f"--ckpt_path={route / name}/expert.safetensors", *data, "--statistic=gram"]
        assert main([*command, "--samples_per_task=24", f"--output={tmp_path / name}", *QUIET]) == 0
    files = ", ".join(f"{name}: {tmp_path}/{name}/expert.gram.safetensors" for name in ("digits", "letters"))
    grams = f"--gram={{{files}}}"
    assert main(["merge", f"--experts={experts_of(route)}", "--method=RegMean", grams, f"--output={tmp_path}"]) == 0
    assert load_provenance(tmp_path / "regmean.safetensors")["samples_per_task"] == 24


@pytest.mark.slow
def test_report_is_written_again_from_files(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(finished), f"--output={tmp_path / 'again.html'}"]) == 0
    page = (tmp_path / "again.html").read_text()
    assert "distillation" in page
    assert "name: tiny" in page
    assert capsys.readouterr().out == f"{tmp_path / 'again.html'}\n"


@pytest.mark.slow
def test_a_command_that_goes_well_says_nothing_on_standard_error(finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "coin", "report", str(finished), f"--output={tmp_path / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    assert done.stdout == f"{tmp_path / 'page.html'}\n"


@pytest.mark.slow
def test_imported_experts_take_the_place_of_training(finished: Path, config: Path, tmp_path: Path) -> None:
    given = f"{{digits: {finished}/seed-0/experts/digits/expert.safetensors}}"
    extra = [f"--output={tmp_path}", f"--expert.checkpoints={given}"]
    assert main(["run", "-c", str(config), *extra, "--methods=[{class_path: Average}]"]) == 0
    own, _ = load_state(tmp_path / "tiny/seed-0/experts/digits/expert.safetensors")
    wanted, _ = load_state(finished / "seed-0/experts/digits/expert.safetensors")
    assert all(own[name].equal(wanted[name]) for name in wanted)
    assert not (tmp_path / "tiny/seed-0/experts/digits/checkpoints").exists()
