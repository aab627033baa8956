"""The plan of an experiment: which option is in which step's key, and where a person sees what steps make."""

import sys
from dataclasses import replace

import pytest
import torch

from coin.commands.run import read_experiment
from coin.data import TaskData
from coin.errors import CoinError, FileError
from coin.networks import load_network
from coin.pipeline.plan import plan, publish
from coin.pipeline.pool import Launch
from coin.pipeline.run import execute, run_experiment
from coin.pipeline.steps.imported import place_config

BASE = {"base", "initial-10", "initial-6"}
EXPERTS = {"expert-digits", "expert-letters"}
FISHERS = {"fisher-digits", "fisher-letters"}
COINS = {"coded-coin", "coded-coin-recalibrate", "coded-coin-keep"}
MERGES = {"coded-average", "coded-distillation", *COINS}
COPIES = {"replicas-3bit-delta"}
RESULTS = {"evaluate", "report"}
AFTER_DIGITS = {"expert-digits", "fisher-digits", *COPIES, *MERGES, *RESULTS}
AFTER_BASE = {*EXPERTS, *FISHERS, *COPIES, *MERGES, *RESULTS}
EVERY = BASE | AFTER_BASE


@pytest.fixture
def read(config, tmp_path):
    """Return a function that reads the small experiment with options."""
    usual = ["-c", str(config), f"--output={tmp_path}", "--replicas=[{bits: 3}]"]
    return lambda *options: read_experiment([*usual, *options])[0]


@pytest.fixture
def planned(read):
    """Return a function that plans the small experiment with options: the steps by their names."""
    return lambda *options: {step.name: step for step in plan(read(*options))}


def changed(before, after):
    """Return the names of steps of the later plan that the first one lacks."""
    known = {step.key for step in before.values()}
    return {name for name, step in after.items() if step.key not in known}


def test_a_plan_has_every_step_after_what_it_needs(planned, tmp_path):
    steps = planned()
    assert steps.keys() == EVERY
    done = set()
    for step in steps.values():
        assert {need.key for need in step.needs} <= done
        done.add(step.key)
    assert steps["report"].closure.keys() == done
    assert not list(tmp_path.iterdir())  # nothing is written


CHANGES = {
    "--trainer={precision: 32, devices: auto, accelerator: cpu, log_every_n_steps: 1}": set(),
    "--trainer={plugins: [{class_path: a.B}]}": EVERY,
    "--trainer={precision: bf16-mixed}": EVERY,
    "--trainer={devices: 2, strategy: ddp}": EVERY,
    "--tasks.letters.init_args.batch_size=16": set(),
    "--tasks.letters.init_args.test_per_class=5": RESULTS,
    "--tasks.digits.init_args.max_test=50": RESULTS,
    "--base.lr=0.3": EVERY,
    "--expert.lr=0.3": AFTER_BASE,
    "--expert.overrides={digits: {lr: 0.3}}": AFTER_DIGITS,
    "--calibration.samples_per_task=9": {*FISHERS, *MERGES, *RESULTS},
    "--calibration.fisher_kind=categorical": {*FISHERS, *COINS, *RESULTS},
    "--calibration.promise_samples=60": RESULTS,
    "--code=[[0.5,0.5]]": MERGES | RESULTS,
    "--name=other": RESULTS,
    "--replicas=[{bits: 2}]": {"replicas-2bit-delta", *RESULTS},
}


@pytest.mark.parametrize("option", CHANGES)
def test_an_option_changes_the_keys_of_what_it_changes(option, planned):
    assert changed(planned(), planned(option)) == CHANGES[option]


def test_seeds_and_experiments_share_what_has_one_key(planned, read):
    assert changed(planned("--name=p1"), planned("--name=p2", "--seeds=[1]")) == AFTER_BASE
    both = plan(read("--seeds=[0,1]"))
    assert len(both) == len(BASE) + 2 * len(AFTER_BASE) + 1  # and the report of both


def test_statistics_on_other_samples_have_files_of_their_own(read):
    pooled = "{class_path: Coin, init_args: {fisher_data: pooled, label: pooled}}"
    steps = plan(read(f"--methods=[{{class_path: Coin}}, {pooled}]"))
    fishers = [step for step in steps if step.name == "fisher-letters"]
    assert {step.place.name: [*step.tasks] for step in fishers} == {
        "letters.fisher.safetensors": ["letters"],
        "letters.fisher-exact-pooled.safetensors": ["digits", "letters"],
    }


LOGS = {
    "base": ("tiny-base", "expert", "base"),
    "expert-digits": ("tiny-seed-0-expert-digits", "expert", "digits"),
    "coded-distillation": ("tiny-seed-0-distillation", "method", "distillation"),
    "evaluate": ("tiny-seed-0-evaluate", "evaluate", "evaluate"),
}


@pytest.mark.parametrize("name", LOGS)
def test_a_run_of_w_and_b_has_what_it_is_found_and_grouped_by(name, planned):
    step = planned("--wandb.tags=[mine]")[name]
    called, kind, subject = LOGS[name]
    assert (step.log.group, step.log.name, step.log.type) == ("tiny", called, kind)
    assert step.log.tags == (subject, "small_resnet", "mine")
    config = step.log.config
    assert config["seed"] == (None if name == "base" else 0)
    assert config["method" if kind == "method" else "task"] == subject
    assert (config["num_experts"], config["samples_per_task"]) == (2, 24)
    assert config["experiment"]["calibration"]["fisher_kind"] == "exact"  # a default, filled in
    assert config["experiment"]["code"] == [[0.4, 0.6]]


OWN = """
from torch import nn
from parts.sizes import WIDTH
import coin
class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, WIDTH, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, num_classes))
class Shapes(coin.data.Digits):
    pass
class Middle(coin.Average):
    pass
def merged(experts, calibration):
    return experts[0]
"""
FILES = {
    "own_classes.py": OWN,
    "parts/sizes.py": "WIDTH = 4",
    "parts/__init__.py": "",
    "aside.py": "",
}
NETWORK = "--network={name: own_classes.Net, image_size: 16}"
TASK = "--tasks.digits={class_path: own_classes.Shapes}"
METHOD = "--methods=[{class_path: own_classes.Middle}, {class_path: Coin}]"
FUNCTION = "--methods=[{class_path: UserMethod, init_args: {function: own_classes.merged}}]"
OF_TWO_METHODS = EVERY - MERGES | {"coded-average", "coded-coin"}
AFTER_METHOD = {"coded-average", *RESULTS}
EDITS = {
    "the class of a network": (NETWORK, "own_classes.py", "A = 1", OF_TWO_METHODS),
    "the class of a task": (TASK, "own_classes.py", "A = 1", AFTER_DIGITS & OF_TWO_METHODS),
    "the class of a method": (METHOD, "own_classes.py", "A = 1", AFTER_METHOD),
    "a function": (FUNCTION, "own_classes.py", "A = 1", {"coded-merged", *RESULTS}),
    "what it imports": (METHOD, "parts/sizes.py", "A = 1", AFTER_METHOD),
    "the package of this": (METHOD, "parts/__init__.py", "A = 1", AFTER_METHOD),
    "another file": (METHOD, "aside.py", "A = 1", set()),
    "a comment": (METHOD, "own_classes.py", "# a comment", set()),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_class_of_the_user_s_changes_the_keys_of_what_it_makes(
    case, planned, tmp_path, monkeypatch
):
    option, edited, edit, expected = EDITS[case]
    folder = tmp_path / "code"
    (folder / "parts").mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(folder)

    def forget():
        for module in ("own_classes", "parts", "parts.sizes"):
            sys.modules.pop(module, None)

    forget()  # another case
    before = planned(METHOD, option)
    assert changed(before, planned(METHOD, option)) == set()
    (folder / edited).write_text(f"{FILES[edited]}\n{edit}\n")
    forget()
    assert changed(before, planned(METHOD, option)) == expected


def test_imported_experts_are_known_by_their_contents(planned, tmp_path):
    def with_expert(name, contents):
        path = tmp_path / name
        path.write_text(contents)
        return planned(f"--expert.checkpoints={{digits: {path}}}")

    first = with_expert("a.safetensors", "weights")
    assert changed(first, with_expert("b.safetensors", "weights")) == set()
    # An expert's place is in what a run leaves for its repetition, not in a key.
    assert changed(first, with_expert("b.safetensors", "others")) == AFTER_DIGITS


def test_a_folder_of_hugging_face_s_is_known_by_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("weights")
    before = place_config(f"hf/{tmp_path}")
    assert before["files"] == [tmp_path / "model.safetensors"]
    (tmp_path / "config.json").write_text('{"id2label": {}}')
    assert place_config(f"hf/{tmp_path}") != before
    assert place_config("hf/some/id") == {"place": "hf/some/id", "contents": {}, "files": []}


def write(step, **files):
    """Write the files of a step."""
    step.folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (step.folder / f"{name}.csv").write_text(text)


def test_links_lead_to_the_latest_and_leave_what_was_made_before(planned, tmp_path):
    place = tmp_path / "tiny/seed-0/experts/digits"
    first = planned()["expert-digits"]
    second = planned("--expert.lr=0.3")["expert-digits"]
    for step, text in ((first, "1"), (second, "2")):
        write(step, curve=text)
        step.publish()
        assert (place / "curve.csv").read_text() == text
    assert (first.folder / "curve.csv").read_text() == "1"
    assert not place.readlink().is_absolute()
    place.unlink()
    place.mkdir()
    found = r"found the folder .*digits', expected coin's own link or nothing"
    with pytest.raises(FileError, match=found):
        second.publish()


def test_a_seed_s_folder_shows_the_latest_evaluation_beside_what_somebody_wrote(read, tmp_path):
    def show(option, **files):
        experiment = read(option)
        steps = plan(experiment)
        (evaluation,) = (step for step in steps if step.name == "evaluate")
        write(evaluation, **files)
        publish(experiment, [evaluation], steps)

    seed = tmp_path / "tiny/seed-0"
    show("--decoders=[linear]", results="1", promise="2")
    assert (seed / "promise.csv").read_text() == "2"
    (seed / "mine.csv").write_text("mine")
    show("--decoders=[ridge]", results="3")
    shown = {path.name: path.read_text() for path in seed.iterdir()}
    assert shown == {"results.csv": "3", "mine.csv": "mine"}


def test_a_part_of_an_experiment_reads_the_data_of_its_tasks_alone(read, monkeypatch):
    loaded = set()
    run = []
    monkeypatch.setattr(TaskData, "load", lambda task: loaded.add(type(task).__name__))
    monkeypatch.setattr(TaskData, "prepare_data", lambda task: loaded.add(type(task).__name__))
    monkeypatch.setattr("coin.pipeline.run.execute", lambda step, _: run.append(step.name))
    monkeypatch.setattr("coin.pipeline.run.publish", lambda *_: None)
    run_experiment(read(), Launch(), lambda *_: None, only="digits")
    assert run == ["base", "initial-10", "expert-digits"]
    assert loaded == {"Digits"}
    known = "found no task or step 'nothing', expected one of base, initial-10, initial-6"
    with pytest.raises(CoinError, match=known):
        run_experiment(read(), Launch(), lambda *_: None, only="nothing")


def test_too_few_samples_for_any_promise_are_told_of_at_the_start(read, recwarn):
    experiment = read()
    for samples in (0, 148, 149):
        experiment.calibration = replace(experiment.calibration, promise_samples=samples)
        experiment.check_data([])
    (told,) = recwarn
    expected = "nothing will be promised: found promise_samples=148, expected at least 149 for"
    assert str(told.message).startswith(expected)


@pytest.mark.parametrize("option", ["samples_per_task", "promise_samples"])
def test_too_few_samples_are_told_of_before_any_training(option, read):
    experiment = read(f"--calibration.{option}=199")
    with pytest.raises(CoinError, match=r"found 199 .* samples of letters, expected at most"):
        experiment.check_data(["letters"])


def test_experts_of_different_class_counts_start_from_one_body(planned):
    steps = planned("--base=null")
    states = {}
    for name in ("initial-10", "initial-6"):
        execute(steps[name], name)
        states[name] = load_network(steps[name].output).network.state_dict()
    ten, six = states.values()
    assert len(ten["fc.bias"]) == 10
    for head in ("fc.weight", "fc.bias"):
        ten[head] = ten[head][:6]
    torch.testing.assert_close(ten, six, rtol=0, atol=0)
