"""``coin run`` from start to finish: its files, its skipping, its resuming."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import yaml

from coin.cli import main
from coin.files.atomic import sha256_of
from coin.files.safetensors import load_provenance, load_state
from coin.files.tensors import fingerprint
from coin.modules import Coded
from coin.reporting import read_results
from coin.reporting.results import COLUMNS, requested_policy
from coin.reporting.summary import read_run

pytestmark = pytest.mark.slow


def same_numbers(one: Path, other: Path) -> None:
    pd.testing.assert_frame_equal(
        read_results(one).drop(columns=["merge_seconds", "decoder_seconds", "experiment"]),
        read_results(other).drop(columns=["merge_seconds", "decoder_seconds", "experiment"]),
        check_exact=True,
    )


def test_results_hold_every_method_decoder_and_task(finished: Path) -> None:
    frame = pd.read_csv(finished / "seed-0" / "results.csv", keep_default_na=False)
    assert tuple(frame.columns) == COLUMNS
    found = set(zip(frame.method, frame.batchnorm.map(requested_policy), frame.decoder, frame.task, strict=True))
    methods = [("average", "auto"), ("distillation", "keep"), ("coin", "auto")]
    methods += [(f"coin-{policy}", policy) for policy in ("recalibrate", "keep")]
    wanted = set(product(methods, ("linear", "ridge", "feature_ridge"))) | {(("oracle", ""), "linear")}
    wanted |= set(product([("none", "")], ("ridge", "feature_ridge")))
    assert found == {(*method, decoder, task) for (method, decoder), task in product(wanted, ("digits", "letters"))}
    assert set(frame.samples_per_task) == {24}


def test_numbers_are_consistent(finished: Path) -> None:
    frame = read_results(finished / "seed-0")
    oracle = frame[frame.method == "oracle"]
    assert (oracle.nda == 1).all()
    assert (oracle.agreement == 1).all()
    for row in frame.itertuples():
        if row.expert_accuracy > 0:
            assert math.isclose(row.nda, row.decoded_accuracy / row.expert_accuracy)
    # One expert, one accuracy, whatever decodes it.
    assert (frame.groupby("task").expert_accuracy.nunique() == 1).all()
    # 77 digits and 54 letters were tested, each once.
    assert frame.groupby("task").chance.unique().map(list).to_dict() == {"digits": [1 / 10], "letters": [1 / 6]}
    for task, count in (("digits", 77), ("letters", 54)):
        shares = frame[frame.task == task].decoded_accuracy * count
        assert (abs(shares - shares.round()) < 1e-9).all()


def test_costs_count_statistics_and_choices(finished: Path) -> None:
    rows = read_results(finished / "seed-0")
    rows["batchnorm"] = rows.batchnorm.map(requested_policy)
    rows = rows.set_index(["method", "batchnorm", "decoder", "task"])
    frame, fitted = rows.merge_passes, rows.decoder_passes
    said = json.loads((finished / "seed-0/results.json").read_text())["methods"]
    chosen = {(method["label"], method["batchnorm"].partition(":")[0]): method["chosen"] for method in said}

    def choice(label: str) -> int:
        """Two experts and two networks on the held-out samples; one recalibrated on the others, at last on all."""
        return 4 * 10 + 38 + 48 * (chosen[label, "auto"]["batchnorm"] == "recalibrate")

    # Average: its choice of a BatchNorm policy. COIN: a forward and ten (or six) backward passes a sample as well.
    assert frame["average", "auto", "linear", "digits"] == choice("average")
    fisher = 24 * (1 + 2 * 10) + 24 * (1 + 2 * 6)
    assert frame["coin", "auto", "linear", "digits"] == fisher + choice("coin")
    assert frame["coin-recalibrate", "recalibrate", "linear", "digits"] == fisher + 48
    assert frame["coin-keep", "keep", "linear", "digits"] == fisher
    # A calibrated decoder needs two experts and one coded model on 48 samples; the survivors alone have no coded model.
    assert fitted["coin", "auto", "linear", "digits"] == 0
    assert fitted["coin", "auto", "feature_ridge", "digits"] == fitted["coin", "auto", "ridge", "digits"] == 3 * 48
    assert fitted["none", "", "ridge", "digits"] == 2 * 48
    # Distillation's cost has both experts on all samples, and ten steps forward and backward on 16 each.
    distilled = chosen["distillation", "keep"]
    assert distilled == load_provenance(finished / "seed-0/coded/distillation.safetensors")["chosen"]
    assert frame["distillation", "keep", "linear", "digits"] >= 2 * 48 + 3 * 16 * 10


FILES = [
    *("config.yaml", "experts/digits/expert.safetensors", "statistics/digits.fisher.safetensors"),
    *("coded/average.safetensors", "coded/coin.safetensors", "coded/coin-recalibrate.safetensors"),
    *("coded/distillation.safetensors", "results.csv", "results.json", "report.html"),
]


def test_folder_holds_the_files_of_the_design(finished: Path) -> None:
    seed = finished / "seed-0"
    assert [name for name in FILES if not (seed / name).is_file()] == []
    assert list((seed / "plots").glob("*.png"))
    assert (finished / "summary.csv").is_file()
    document = json.loads((seed / "results.json").read_text())
    assert document["configuration"]["calibration"]["samples_per_task"] == 24
    assert document["versions"]["torch"]
    assert len(document["rows"]) == len(read_results(seed))


def test_coded_models_and_experts_say_what_made_them(finished: Path) -> None:
    provenance = load_provenance(finished / "seed-0/coded/coin.safetensors")
    assert (provenance["code"], provenance["row"], provenance["samples_per_task"]) == ([[0.4, 0.6]], 0, 24)
    assert (provenance["tasks"], provenance["class_counts"]) == (["digits", "letters"], [10, 6])
    assert provenance["method"]["options"]["damping"] == 1e-6
    assert len(provenance["sha256"]) == 4  # two experts, two Fisher files
    kept = load_provenance(finished / "seed-0/coded/coin-keep.safetensors")["sha256"]  # statistics of the start
    initial = {path for path in kept.keys() - provenance["sha256"].keys() if "initial" in path}
    assert {kept[path] for path in initial} == {sha256_of(Path(path)) for path in initial} != set()
    expert = load_provenance(finished / "seed-0/experts/letters/expert.safetensors")
    assert expert["task"] == "letters"
    assert list(expert["sha256"].values()) == [sha256_of(finished / "base/initial-6.safetensors")]


def test_distilled_model_keeps_the_statistics_of_its_start(finished: Path) -> None:
    average, _ = load_state(finished / "seed-0/coded/average.safetensors")
    distilled, _ = load_state(finished / "seed-0/coded/distillation.safetensors")
    kept, _ = load_state(finished / "seed-0/coded/coin-keep.safetensors")
    base, _ = load_state(finished / "base/initial-10.safetensors")
    buffers = [name for name in average if "running" in name]
    assert buffers
    for name in buffers:
        assert average[name].equal(distilled[name])
        assert base[name].equal(kept[name])
    assert not average["stem.0.weight"].equal(distilled["stem.0.weight"])


@pytest.mark.usefixtures("no_reports")
def test_what_auto_chose_stands_in_the_results_and_other_statistics_in_files_of_their_own(
    copied: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = copied / "seed-0"
    methods = "[{class_path: Coin}, {class_path: Coin, init_args: {fisher_data: pooled, label: pooled}}]"
    extra = [f"--methods={methods}", "--decoders=[linear]"]
    assert main(["run", "-c", str(config), f"--output={copied.parent}", *extra]) == 0
    told = capsys.readouterr().err
    assert "Fisher (exact, own) of digits: up to date" in told  # of these samples already
    for task, classes in (("digits", 10), ("letters", 6)):
        for name, data, samples in (("fisher", "own", 24), ("fisher-exact-pooled", "pooled", 48)):
            made = load_provenance(seed / f"statistics/{task}.{name}.safetensors")
            assert (made["task"], made["data"], made["kind"], made["samples"]) == (task, data, "exact", samples)
            assert made["passes"] == samples * (1 + 2 * classes)
    said = json.loads((seed / "results.json").read_text())["methods"]
    for label, samples, each in zip(("coin", "pooled"), (24, 48), said, strict=True):
        chosen = each["chosen"]
        residuals = chosen["held_out_residual"]
        assert set(residuals) == {"average", "recalibrate"}
        assert chosen["batchnorm"] == min(residuals, key=residuals.__getitem__)
        assert chosen == load_provenance(seed / f"coded/{label}.safetensors")["chosen"]
        rows = read_results(seed).query(f"method == '{label}'")
        assert set(rows.batchnorm) == {f"auto:{chosen['batchnorm']}"}
        choice = (2 + 2) * 10 + 38 + 48 * (chosen["batchnorm"] == "recalibrate")  # experts and both networks, held out
        assert set(rows.merge_passes) == {samples * ((1 + 2 * 10) + (1 + 2 * 6)) + choice}


def plan_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the names of the steps that a dry run says are to do."""
    capsys.readouterr()
    assert main(["run", *arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    folders = [line.rpartition("(")[2] for line in lines if line.startswith("to do")]
    return {folder.rpartition("-")[0] for folder in folders}


MERGES = {"coded-average", "coded-coin", "coded-coin-recalibrate", "coded-coin-keep", "coded-distillation"}
FISHERS = {"fisher-digits", "fisher-letters"}


def test_a_dry_run_says_what_there_is_to_do_and_writes_nothing(
    finished: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(plan_of(["-c", str(config), f"--output={tmp_path}"], capsys)) == 14
    assert not list(tmp_path.iterdir())
    command = ["-c", str(config), f"--output={finished.parent}"]
    assert plan_of(command, capsys) == set()
    changed = plan_of([*command, "--calibration.samples_per_task=20"], capsys)
    assert changed == FISHERS | MERGES | {"evaluate", "report"}
    assert main(["run", *command, "--dry-run", "--decoders=[linear]"]) == 0
    told = capsys.readouterr().out
    assert "tiny: 3 of 15 steps to do\n" in told
    assert "to do  seed 0: evaluation  (evaluate-" in told
    wrong = [*command, "--dry-run", "--expert.trainable=[nothing]"]  # what a run refuses, a dry run refuses
    assert main(["run", *wrong]) == 2
    assert "matches no parameter" in capsys.readouterr().err


def test_one_step_runs_with_what_it_needs_and_nothing_else(
    finished: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "-c", str(config), f"--output={tmp_path}", "--only=fisher-letters"]
    assert main(command) == 0
    made = {path.parent.name.rpartition("-")[0] for path in (tmp_path / ".steps").glob("*/done.json")}
    assert made == {"base", "initial-10", "initial-6", "expert-letters", "fisher-letters"}
    assert "seed 0: Fisher (exact, own) of letters: computing" in capsys.readouterr().err
    wanted, _ = load_state(finished / "seed-0/statistics/letters.fisher.safetensors")
    found, _ = load_state(tmp_path / "tiny/seed-0/statistics/letters.fisher.safetensors")
    assert all(found[name].equal(wanted[name]) for name in wanted)
    assert main(["run", "-c", str(config), "--only=nothing", f"--output={tmp_path}"]) == 2
    assert "found no task or step 'nothing', expected one of base, initial-10, initial-6" in capsys.readouterr().err


def written(folder: Path) -> dict[Path, int]:
    """Return when every file below a folder was written, but for locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {path: path.stat().st_mtime_ns for path in files}


def test_second_run_does_nothing_again_and_prints_the_table(
    copied: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = written(copied.parent)
    assert main(["run", "-c", str(config), f"--output={copied.parent}"]) == 0
    after = written(copied.parent)
    assert after == before
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("Experts, own accuracy in %: digits ")
    assert f"report: {copied / 'report.html'}" in told


@pytest.mark.usefixtures("no_reports")
def test_a_changed_option_makes_anew_what_depends_on_it_beside_what_was_there(copied: Path, config: Path) -> None:
    before = written(copied.parent / ".steps")
    assert main(["run", "-c", str(config), f"--output={copied.parent}", "--calibration.samples_per_task=20"]) == 0
    after = written(copied.parent / ".steps")
    assert before == {path: after[path] for path in before}  # what is finished is never touched
    fresh = {path.relative_to(copied.parent / ".steps").parts[0].rpartition("-")[0] for path in after.keys() - before}
    assert fresh == FISHERS | MERGES | {"evaluate", "report"}
    assert set(read_results(copied / "seed-0").samples_per_task) == {20}
    assert yaml.safe_load((copied / "seed-0/config.yaml").read_text())["calibration"]["samples_per_task"] == 20
    assert main(["run", "-c", str(config), f"--output={copied.parent}"]) == 0  # and back, computing nothing
    assert set(read_results(copied / "seed-0").samples_per_task) == {24}
    assert written(copied.parent / ".steps") == after


@pytest.mark.usefixtures("no_reports")
def test_what_was_just_run_is_summarised_and_what_it_has_not_is_shown_no_more(copied: Path, config: Path) -> None:
    seed, command = copied / "seed-0", ["run", "-c", str(config), f"--output={copied.parent}"]
    own = ["--methods=[{class_path: Average}]", "--seeds=[0]"]
    assert main([*command, *own, "--calibration.promise_samples=8", "--replicas=[{bits: 3}]"]) == 0
    assert (seed / "promise.csv").is_file()
    assert (seed / "replicas").is_dir()
    assert main([*command, *own, "--seeds=[1]"]) == 0
    assert read_run(copied)[0] == [copied / "seed-1"]
    assert main([*command, *own]) == 0
    assert not (seed / "promise.csv").exists()
    assert not list((seed / "replicas").iterdir())
    for room in ("coded", "systems"):
        assert [path.name for path in (seed / room).iterdir()] == ["average.safetensors"]
    # Back to what is done: nothing is measured again, so its results are older than the other seed's.
    assert main(command) == 0
    assert {path.name for path in (seed / "coded").iterdir()} > {"coin.safetensors", "average.safetensors"}
    assert set(pd.read_csv(copied / "summary.csv", keep_default_na=False)["method"]) > {"coin", "average"}
    assert read_run(copied)[0] == [seed]


@pytest.mark.usefixtures("no_reports")
def test_an_interrupted_change_leaves_what_is_shown_as_it_was(
    copied: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown() -> dict[str, str]:
        links = {path: path.readlink() for path in copied.rglob("*") if path.is_symlink()}
        return {str(path): str(target) for path, target in links.items() if ".steps" in target.parts}

    before = shown()
    assert before
    command = ["run", "-c", str(config), f"--output={copied.parent}", "--expert.lr=0.3"]
    with monkeypatch.context() as patch:
        patch.setattr("coin.pipeline.steps.merge.EstimateStatistic.run", interrupt)
        assert main(command) == 130
    assert len(list((copied.parent / ".steps").glob("expert-digits-*/done.json"))) == 2
    assert shown() == before
    assert main(["choose", str(copied)]) == 0
    Coded.from_run(copied)  # what coin serve reads
    # A part of the changed experiment is shown, and no more what was measured with the others.
    finished_expert = (copied / "seed-0/experts/digits").resolve()
    assert main([*command, "--only=digits"]) == 0
    assert (copied / "seed-0/experts/digits").resolve() != finished_expert
    assert not (copied / "seed-0/results.csv").exists()
    capsys.readouterr()
    for reads in ("report", "choose"):
        assert main([reads, str(copied)]) == 2
        assert "expected the folder of an experiment or of one seed" in capsys.readouterr().err
    assert main(["run", "-c", str(config), f"--output={copied.parent}"]) == 0
    assert shown() == before


def interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_an_error_of_the_user_s_own_keeps_its_traceback_and_ends_the_run(
    copied: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise KeyError("mine")

    monkeypatch.setattr("coin.pipeline.steps.evaluation.Evaluate.run", fail)
    with pytest.raises(KeyError, match="mine"):
        main(["run", "-c", str(config), f"--output={copied.parent}", "--decoders=[linear]"])
    steps = [path for path in (copied.parent / ".steps").glob("evaluate-*") if not (path / "done.json").is_file()]
    assert len(steps) == 1


@pytest.mark.parametrize("output", ["base-*/logs", "expert-letters-*/checkpoints/last.ckpt"])
def test_killed_run_finishes_with_the_same_results(
    finished: Path, config: Path, tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "coin", "run", "-c", str(config), f"--output={tmp_path}"]
    # An earlier test's W&B service may be gone by now.
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / ".steps").glob(output)) and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "tiny/summary.csv").exists()
    subprocess.run(command, check=True, timeout=240, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    same_numbers(tmp_path / "tiny/seed-0", finished / "seed-0")


@pytest.mark.usefixtures("no_reports")
def test_a_training_killed_before_its_export_is_exported(
    finished: Path, copied: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyError("killed")

    folder = (copied / "seed-0/experts/digits").resolve()
    assert not list(folder.rglob("*.ckpt"))  # of what is finished
    shutil.rmtree(folder)
    command = ["run", "-c", str(config), f"--output={copied.parent}"]
    with monkeypatch.context() as patch:
        patch.setattr("coin.callbacks.export.ExpertExport.on_train_end", killed)
        with pytest.raises(KeyError, match="killed"):
            main(command)
    assert (folder / "checkpoints/last.ckpt").is_file()
    monkeypatch.setattr("coin.modules.Expert.training_step", killed)  # nothing is trained again
    assert main(command) == 0
    state, _ = load_state(folder / "expert.safetensors")
    wanted, _ = load_state(finished / "seed-0/experts/digits/expert.safetensors")
    assert all(state[name].equal(wanted[name]) for name in wanted)


def test_run_folder_is_enough_to_repeat_the_run(finished: Path, tmp_path: Path) -> None:
    config = finished / "seed-0/config.yaml"
    assert main(["run", "-c", str(config), f"--output={tmp_path}"]) == 0
    again = tmp_path / "tiny/seed-0"
    same_numbers(again, finished / "seed-0")
    made = sorted(path.relative_to(finished) for path in finished.glob("seed-0/[ces]*/**/*.safetensors"))
    assert len(made) >= 2 + 2 + 5  # bit for bit, but for what the files say of their seconds
    for path in made:
        assert fingerprint(load_state(tmp_path / "tiny" / path)[0]) == fingerprint(load_state(finished / path)[0]), path
    wanted = yaml.safe_load(config.read_text().replace(str(finished.parent), str(tmp_path)))
    assert yaml.safe_load((again / "config.yaml").read_text()) == wanted
    assert "launch" not in config.read_text()
