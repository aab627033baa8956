"""The commands one by one, in-process: step by step they give what ``coin run`` gives."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from coin.cli import main
from coin.errors import CoinWarning
from coin.files.safetensors import load_provenance, load_state
from coin.reporting import read_results

QUIET = [
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=false",
    "--trainer.enable_model_summary=false",
]
ONCE = ["--trainer.max_epochs=1", *QUIET]
NETWORK = [
    "--model=Expert",
    "--model.network=small_resnet",
    "--model.options={width: 4}",
    "--model.image_size=16",
]
DIGITS = ["--data=Digits", "--data.max_train=120", "--data.max_test=77", "--data.image_size=16"]
LETTERS = [
    "--data=Glyphs",
    "--data.classes=A-F",
    "--data.train_per_class=30",
    "--data.test_per_class=9",
]
DATA = {"digits": DIGITS, "letters": [*LETTERS, "--data.image_size=16"]}
CLASSES = {"digits": 10, "letters": 6}
TASKS = """{
    digits: {class_path: Digits, init_args: {max_train: 120, max_test: 77, image_size: 16}},
    letters: {class_path: Glyphs, init_args: {classes: A-F, train_per_class: 30, test_per_class: 9, image_size: 16}}
}"""
SWAPPED = "{letters: {class_path: Glyphs}, digits: {class_path: Digits}}"
CALLBACKS = [
    "--trainer.callbacks+=ExpertExport",
    "--trainer.callbacks+=FisherEstimator",
    "--trainer.callbacks.init_args.samples_per_task=24",
]
CALIBRATION = [f"--tasks={TASKS}", "--samples_per_task=24", "--batch_size=16"]


def files_of(folder: Path, kind: str = "") -> str:
    """Return the files of a kind, by default the experts', as an option's value."""
    return f"{{digits: {folder}/digits/expert{kind}.safetensors, letters: {folder}/letters/expert{kind}.safetensors}}"


def check_close(found: Path, expected: Path) -> None:
    """Compare the tensors of two files, of which other batches were summed."""
    own, _ = load_state(found)
    wanted, _ = load_state(expected)
    assert own.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(own[name], tensor, rtol=0, atol=1e-5 * float(tensor.abs().max()))


@pytest.fixture(scope="module")
def route(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same experiment step by step: ``coin fit`` twice with the callbacks."""
    folder = tmp_path_factory.mktemp("route")
    for name, data in DATA.items():
        initial = f"--model.initial={finished}/base/initial-{CLASSES[name]}.safetensors"
        model = [*NETWORK, "--model.lr=0.02", initial]
        trainer = ["--trainer.max_epochs=2", f"--output={folder / name}", *CALLBACKS, *QUIET]
        assert main(["fit", *model, *data, "--data.batch_size=32", *trainer]) == 0
    return folder


@pytest.mark.parametrize("task", DATA)
def test_fit_gives_the_experts_of_the_run(task: str, route: Path, finished: Path) -> None:
    check_close(
        route / task / "expert.safetensors", finished / f"seed-0/experts/{task}/expert.safetensors"
    )


def test_merge_and_evaluate_give_the_numbers_of_the_run(
    route: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coded = route / "coded"
    results = route / "results"
    experts = files_of(route)
    command = [
        "merge",
        f"--experts={experts}",
        "--code=[[0.4, 0.6]]",
        f"--output={coded}",
        *CALIBRATION,
    ]
    coin = ["--method=Coin", f"--fisher={files_of(route, '.fisher')}"]
    for method in (["--method=Average"], coin, [*coin, "--method.batchnorm=recalibrate"]):
        assert main([*command, *method]) == 0
    files = ", ".join(
        str(coded / f"{name}.safetensors") for name in ("average", "coin", "coin-recalibrate")
    )
    model = ["--model=DecodingEvaluator", f"--model.experts={experts}", f"--model.coded=[{files}]"]
    data = [
        "--data=Tasks",
        f"--data.tasks={TASKS}",
        "--data.samples_per_task=24",
        "--data.batch_size=16",
    ]
    assert main(["evaluate", *model, *data, f"--output={results}", *QUIET]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"measured; wrote {results}/results.csv"
    keys = ["method", "batchnorm", "decoder", "task"]
    every = read_results(results).set_index(keys)
    own = every.drop("expert_head", level="decoder")
    assert len(own) < len(every)  # of all decoders, the default
    wanted = read_results(finished / "seed-0").set_index(keys).loc[own.index]
    columns = [
        "expert_accuracy",
        "decoded_accuracy",
        "nda",
        "agreement",
        "samples_per_task",
        "merge_passes",
    ]
    pd.testing.assert_frame_equal(own[columns], wanted[columns])
    # The Fisher of the callback and of the run differ by rounding: other batches.
    pd.testing.assert_series_equal(own.residual, wanted.residual, rtol=1e-5)


@pytest.fixture
def merge(finished: Path, tmp_path: Path) -> Callable[..., int]:
    """Return a function that merges the experts of the run into the test's folder."""
    experts = f"--experts={files_of(finished / 'seed-0/experts')}"
    return lambda *options: main(
        ["merge", experts, "--code=[[0.4, 0.6]]", f"--output={tmp_path}", *options]
    )


def test_a_merge_without_tasks_warns_and_averages_the_statistics(
    merge: Callable[..., int], finished: Path
) -> None:
    with pytest.warns(
        CoinWarning, match="found no calibration inputs, needed by method 'average' to choose"
    ):
        assert merge("--method=Average") == 0
    made = load_provenance(Path("average.safetensors"))
    assert (made["batchnorm"], made["chosen"], made["passes"]) == (
        "auto",
        {"batchnorm": "average"},
        0,
    )
    found, _ = load_state(Path("average.safetensors"))
    digits, letters = (
        load_state(finished / f"seed-0/experts/{task}/expert.safetensors")[0] for task in DATA
    )
    name = "stem.1.running_var"
    torch.testing.assert_close(found[name], 0.4 * digits[name] + 0.6 * letters[name])


def test_a_merge_with_tasks_records_what_it_chose(
    merge: Callable[..., int], finished: Path
) -> None:
    assert merge("--method=Average", *CALIBRATION) == 0
    chosen = load_provenance(Path("average.safetensors"))["chosen"]
    residuals = chosen["held_out_residual"]
    assert residuals.keys() == {"average", "recalibrate"}
    assert chosen["batchnorm"] == min(residuals, key=residuals.get)
    assert chosen == load_provenance(finished / "seed-0/coded/average.safetensors")["chosen"]


COIN = ["--method=Coin", "--method.batchnorm=average"]
OF_RUN = "RUN/statistics/{}.fisher.safetensors"
DIGITS_FISHER, LETTERS_FISHER = (OF_RUN.format(task) for task in DATA)
OWN = f"--fisher={{digits: {DIGITS_FISHER}, letters: {LETTERS_FISHER}}}"
REFUSED = {
    "no Fisher": (COIN, "fisher"),
    "of other data": (
        [*COIN, OWN, "--method.fisher_data=pooled"],
        "no Fisher (exact, pooled) of expert 'digits'",
    ),
    "of other weights": (
        [*COIN, f"--fisher={{digits: {LETTERS_FISHER}, letters: {DIGITS_FISHER}}}"],
        "run coin fisher again",
    ),
    "no statistic": (
        [*COIN, "--fisher={digits: RUN/coded/average.safetensors}"],
        "make it with coin fisher",
    ),
    "tasks in another order": (
        ["--method=Average", f"--tasks={SWAPPED}"],
        "expected the same order",
    ),
    "no tasks to train on": (
        ["--method=Distillation"],
        "distillation trains on their calibration samples",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_merge_is_refused(
    name: str, merge: Callable[..., int], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = REFUSED[name]
    capsys.readouterr()
    assert merge(*(option.replace("RUN", str(finished / "seed-0")) for option in options)) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_a_fisher_of_own_data_is_taken(merge: Callable[..., int], finished: Path) -> None:
    own = OWN.replace("RUN", str(finished / "seed-0"))
    assert merge(*COIN, own, "--method.fisher_data=own") == 0


@pytest.mark.parametrize("data", [DIGITS, DIGITS[:-1]], ids=["16 pixels", "the expert's pixels"])
def test_the_fisher_command_gives_what_the_callback_gave(
    data: list[str], route: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = route / "digits"
    options = ["--samples_per_task=24", f"--output={tmp_path}", *QUIET]
    assert main(["fisher", f"--ckpt_path={folder / 'expert.safetensors'}", *data, *options]) == 0
    file = tmp_path / "expert.fisher.safetensors"
    assert capsys.readouterr().out.endswith(f"; wrote {file}\n")
    check_close(file, folder / "expert.fisher.safetensors")
    made = load_provenance(file)
    assert made["samples"] == 24
    assert made["weights"] == load_provenance(folder / "expert.fisher.safetensors")["weights"]


def test_gram_files_are_for_regmean(route: Path, tmp_path: Path) -> None:
    for name, data in DATA.items():
        expert = f"--ckpt_path={route / name}/expert.safetensors"
        options = [
            "--statistic=gram",
            "--samples_per_task=24",
            f"--output={tmp_path / name}",
            *QUIET,
        ]
        assert main(["fisher", expert, *data, *options]) == 0
    grams = f"--gram={files_of(tmp_path, '.gram')}"
    assert (
        main(
            [
                "merge",
                f"--experts={files_of(route)}",
                "--method=RegMean",
                grams,
                f"--output={tmp_path}",
            ]
        )
        == 0
    )
    assert load_provenance(tmp_path / "regmean.safetensors")["samples_per_task"] == 24


@pytest.fixture
def checkpoint(finished: Path, tmp_path: Path) -> str:
    """The option of a checkpoint of Lightning's, whose initialisation is gone."""
    initial = tmp_path / "initial.safetensors"
    initial.write_bytes((finished / "base/initial-10.safetensors").read_bytes())
    adam = ["--model.optimizer=Adam", "--model.lr=1e-3", f"--model.initial={initial}"]
    assert main(["fit", *NETWORK, *adam, *DIGITS, *ONCE, f"--output={tmp_path}"]) == 0
    initial.unlink()
    return f"--ckpt_path={next(tmp_path.rglob('*.ckpt'))}"


def test_a_checkpoint_says_which_network_it_is_of(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("test", "validate", "predict"):
        assert main([command, checkpoint, *DIGITS, *QUIET, f"--output={tmp_path}"]) == 0
    assert "test/accuracy" in capsys.readouterr().out
    options = load_provenance(tmp_path / "expert.safetensors")["options"]
    assert (options["optimizer"], options["lr"]) == ("Adam", 1e-3)
    fisher = ["fisher", *DIGITS, "--samples_per_task=5", *QUIET]
    assert main([*fisher, checkpoint]) == 0  # beside the checkpoint
    assert main([*fisher, "--ckpt_path=expert.safetensors", f"--output={tmp_path / 'own'}"]) == 0
    (found,) = tmp_path.glob("**/checkpoints/expert.fisher.safetensors")
    check_close(found, tmp_path / "own/expert.fisher.safetensors")


def fit(*options: str) -> dict[str, torch.Tensor]:
    """Return the weights of an expert that is trained in the folder ``a``."""
    assert main(["fit", *NETWORK, *DIGITS[:-1], "--data.image_size=16", *ONCE, *options]) == 0
    return load_state(Path("a/expert.safetensors"))[0]


@pytest.mark.parametrize("option", ["--output=a", "--trainer.default_root_dir=a"])
def test_the_folder_that_is_given_last_has_the_expert(option: str) -> None:
    Path("options.yaml").write_text("trainer: {default_root_dir: file}\n")
    fit("-c", "options.yaml", option)
    assert not Path("file").exists()


def test_the_seed_of_a_command_is_that_of_its_model_and_its_data() -> None:
    first = fit("--output=a", "--seed_everything=1")
    for options, is_same in (
        (["--model.seed=1", "--data.seed=1"], True),
        (["--seed_everything=1", "--data.seed=2"], False),
        (["--seed_everything=2"], False),
    ):
        found = fit("--output=a", *options)
        assert all(torch.equal(found[name], tensor) for name, tensor in first.items()) is is_same


def test_a_command_that_goes_well_says_where_its_file_is_and_nothing_on_standard_error(
    finished: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "coin", "report", str(finished), f"--output={page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    assert done.stdout == f"{page}\n"
    assert "name: tiny" in page.read_text()
