"""The commands one by one, in-process: step by step they give what ``coin run`` gives."""

import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from coin.cli import main
from coin.errors import CoinWarning
from coin.files.safetensors import load_provenance, load_state
from coin.reporting import read_results

QUIET = (
    "--trainer.enable_progress_bar=false --trainer.logger=false"
    " --trainer.enable_model_summary=false"
)
NETWORK = (
    "--model=Expert --model.network=small_resnet --model.image_size=16 --model.options='{width: 4}'"
)
DIGITS = "--data=Digits --data.max_train=120 --data.max_test=77"
LETTERS = "--data=Glyphs --data.classes=A-F --data.train_per_class=30 --data.test_per_class=9"
DATA = {"digits": DIGITS, "letters": LETTERS}
CLASSES = {"digits": 10, "letters": 6}
TASKS = """'{
    digits: {class_path: Digits, init_args: {max_train: 120, max_test: 77, image_size: 16}},
    letters: {class_path: Glyphs, init_args: {classes: A-F, train_per_class: 30, test_per_class: 9, image_size: 16}}
}'"""
CALLBACKS = (
    "--trainer.callbacks+=ExpertExport --trainer.callbacks+=FisherEstimator"
    " --trainer.callbacks.init_args.samples_per_task=24"
)
CALIBRATION = f"--tasks={TASKS} --samples_per_task=24 --batch_size=16"


def coin(line):
    """Run a command that is written as in a shell."""
    assert main(shlex.split(line)) == 0


def files_of(folder, kind=""):
    """Return the files of a kind, by default the experts', as an option's value."""
    file = f"expert{kind}.safetensors"
    return f"'{{digits: {folder}/digits/{file}, letters: {folder}/letters/{file}}}'"


def check_close(found, expected):
    """Compare the tensors of two files, of which other batches were summed."""
    own, _ = load_state(found)
    wanted, _ = load_state(expected)
    assert own.keys() == wanted.keys()
    for name, tensor in wanted.items():
        largest = float(tensor.abs().max())
        torch.testing.assert_close(own[name], tensor, rtol=0, atol=1e-5 * largest)


@pytest.fixture(scope="module")
def route(finished, tmp_path_factory):
    """The same experiment step by step: ``coin fit`` twice with the callbacks."""
    folder = tmp_path_factory.mktemp("route")
    for name, data in DATA.items():
        initial = f"--model.initial='{finished}/base/initial-{CLASSES[name]}.safetensors'"
        model = f"{NETWORK} --model.lr=0.02 {initial}"
        trainer = f"--trainer.max_epochs=2 {CALLBACKS} {QUIET}"
        data += " --data.image_size=16 --data.batch_size=32"
        coin(f"fit {model} {data} {trainer} --output='{folder}/{name}'")
    return folder


@pytest.mark.parametrize("task", DATA)
def test_fit_gives_the_experts_of_the_run(task, route, finished):
    expert = f"{task}/expert.safetensors"
    check_close(route / expert, finished / "seed-0/experts" / expert)


def test_merge_and_evaluate_give_the_numbers_of_the_run(route, finished, capsys):
    experts = files_of(route)
    merge = f"merge --experts={experts} --code=[[0.4,0.6]] --output='{route}' {CALIBRATION}"
    fisher = f"--fisher={files_of(route, '.fisher')}"
    coin(f"{merge} --method=Average")
    coin(f"{merge} --method=Coin {fisher}")
    coin(f"{merge} --method=Coin --method.batchnorm=recalibrate {fisher}")
    coded = [f"{route}/{name}.safetensors" for name in ("average", "coin", "coin-recalibrate")]
    model = f"--model=DecodingEvaluator --model.experts={experts} --model.coded='{coded}'"
    data = f"--data.tasks={TASKS} --data.samples_per_task=24 --data.batch_size=16"
    coin(f"evaluate {model} --data=Tasks {data} --output='{route}' {QUIET}")
    assert capsys.readouterr().out.splitlines()[-1] == f"measured; wrote {route}/results.csv"
    keys = ["method", "batchnorm", "decoder", "task"]
    every = read_results(route).set_index(keys)
    own = every.drop("expert_head", level="decoder")
    assert len(own) < len(every)  # of all decoders, the default
    wanted = read_results(finished / "seed-0").set_index(keys).loc[own.index]
    accuracies = ["expert_accuracy", "decoded_accuracy", "nda", "agreement"]
    columns = [*accuracies, "samples_per_task", "merge_passes"]
    pd.testing.assert_frame_equal(own[columns], wanted[columns])
    # The Fisher of the callback and of the run differ by rounding: other batches.
    pd.testing.assert_series_equal(own.residual, wanted.residual, rtol=1e-5)


@pytest.fixture
def merge(finished):
    """Return the command that merges the experts of the run into the test's folder."""
    experts = files_of(finished / "seed-0/experts")
    return f"merge --experts={experts} --code=[[0.4,0.6]] --output=."


def test_a_merge_without_tasks_warns_and_averages_the_statistics(merge, finished):
    message = "found no calibration inputs, needed by method 'average' to choose"
    with pytest.warns(CoinWarning, match=message):
        coin(f"{merge} --method=Average")
    found, made = load_state(Path("average.safetensors"))
    assert made["batchnorm"] == "auto"
    assert made["chosen"] == {"batchnorm": "average"}
    assert made["passes"] == 0
    experts = [finished / f"seed-0/experts/{task}/expert.safetensors" for task in DATA]
    digits, letters = (load_state(expert)[0]["stem.1.running_var"] for expert in experts)
    torch.testing.assert_close(found["stem.1.running_var"], 0.4 * digits + 0.6 * letters)


def test_a_merge_with_tasks_records_what_it_chose(merge, finished):
    coin(f"{merge} --method=Average {CALIBRATION}")
    chosen = load_provenance(Path("average.safetensors"))["chosen"]
    residuals = chosen["held_out_residual"]
    assert residuals.keys() == {"average", "recalibrate"}
    assert chosen["batchnorm"] == min(residuals, key=residuals.get)
    assert chosen == load_provenance(finished / "seed-0/coded/average.safetensors")["chosen"]


COIN = "--method=Coin --method.batchnorm=average"
OF_DIGITS = "RUN/statistics/digits.fisher.safetensors"
OF_LETTERS = "RUN/statistics/letters.fisher.safetensors"
OTHER_ORDER = "{letters: {class_path: Glyphs}, digits: {class_path: Digits}}"
REFUSED = {
    "fisher": COIN,
    "no Fisher (exact, pooled) of expert 'digits'": (
        f"{COIN} --fisher='{{digits: {OF_DIGITS}, letters: {OF_LETTERS}}}'"
        " --method.fisher_data=pooled"
    ),
    "run coin fisher again": f"{COIN} --fisher='{{digits: {OF_LETTERS}, letters: {OF_DIGITS}}}'",
    "make it with coin fisher": f"{COIN} --fisher='{{digits: RUN/coded/average.safetensors}}'",
    "expected the same order": f"--method=Average --tasks='{OTHER_ORDER}'",
    "distillation trains on their calibration samples": "--method=Distillation",
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_merge_is_refused(message, merge, finished, capsys):
    options = REFUSED[message].replace("RUN", str(finished / "seed-0"))
    assert main(shlex.split(f"{merge} {options}")) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path().iterdir())


def test_the_fisher_command_gives_what_the_callback_gave(route, capsys):
    folder = route / "digits"
    expert = f"--ckpt_path='{folder}/expert.safetensors'"
    coin(f"fisher {expert} {DIGITS} --samples_per_task=24 --output=. {QUIET}")
    file = Path("expert.fisher.safetensors")
    assert capsys.readouterr().out.endswith(f"; wrote {file}\n")
    check_close(file, folder / file)
    made = load_provenance(file)
    assert made["samples"] == 24
    assert made["weights"] == load_provenance(folder / file)["weights"]


def test_gram_files_are_for_regmean(route):
    for name, data in DATA.items():
        expert = f"--ckpt_path='{route}/{name}/expert.safetensors'"
        coin(
            f"fisher --statistic=gram {expert} {data} --samples_per_task=24 --output={name} {QUIET}"
        )
    grams = f"--gram={files_of('.', '.gram')}"
    coin(f"merge --experts={files_of(route)} --method=RegMean {grams} --output=.")
    assert load_provenance(Path("regmean.safetensors"))["samples_per_task"] == 24


def test_a_checkpoint_says_which_network_it_is_of_without_its_initialisation(finished, capsys):
    initial = Path("initial.safetensors")
    initial.write_bytes((finished / "base/initial-10.safetensors").read_bytes())
    model = f"{NETWORK} --model.optimizer=Adam --model.lr=1e-3 --model.initial={initial}"
    data = f"{DIGITS} --data.image_size=16"
    coin(f"fit {model} {data} --trainer.max_epochs=1 --output=. {QUIET}")
    initial.unlink()
    (found,) = Path().rglob("*.ckpt")
    checkpoint = f"--ckpt_path={found}"
    for command in ("test", "validate", "predict"):
        coin(f"{command} {checkpoint} {data} --output=. {QUIET}")
    assert "test/accuracy" in capsys.readouterr().out
    options = load_provenance(Path("expert.safetensors"))["options"]
    assert options["optimizer"] == "Adam"
    assert options["lr"] == 1e-3
    fisher = f"fisher {data} --samples_per_task=5 {QUIET}"
    coin(f"{fisher} {checkpoint}")
    coin(f"{fisher} --ckpt_path=expert.safetensors --output=own")
    beside = found.with_name("expert.fisher.safetensors")
    check_close(beside, Path("own/expert.fisher.safetensors"))


def fit(options):
    """Return the weights of an expert that is trained in the folder ``a``."""
    data = f"{DIGITS} --data.image_size=16"
    coin(f"fit {NETWORK} {data} --trainer.max_epochs=1 {QUIET} {options}")
    return load_state(Path("a/expert.safetensors"))[0]


@pytest.mark.parametrize("option", ["--output=a", "--trainer.default_root_dir=a"])
def test_the_folder_that_is_given_last_has_the_expert(option):
    Path("options.yaml").write_text("trainer: {default_root_dir: file}\n")
    fit(f"-c options.yaml {option}")
    assert not Path("file").exists()


def test_the_seed_of_a_command_is_that_of_its_model_and_its_data():
    first = fit("--output=a --seed_everything=1")
    for options, is_same in (
        ("--model.seed=1 --data.seed=1", True),
        ("--seed_everything=1 --data.seed=2", False),
        ("--seed_everything=2", False),
    ):
        found = fit(f"--output=a {options}")
        assert all(torch.equal(found[name], tensor) for name, tensor in first.items()) is is_same


def test_a_command_that_goes_well_says_where_its_file_is_and_nothing_on_standard_error(finished):
    command = [sys.executable, "-m", "coin", "report", str(finished), "--output=page.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    assert done.stdout == "page.html\n"
    assert "name: tiny" in Path("page.html").read_text()
