"""The evaluator: its numbers against a slow loop, which networks run, what it refuses, and what it leaves behind."""

import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coin.coding import Code, answer_score, make_decoder
from coin.coding.metrics import DecodingAccuracy
from coin.core.devices import multiplies_in_bfloat16
from coin.core.progress import progress_bar
from coin.data import to_input
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError, FileError
from coin.merging import Average, Experts
from coin.modules import Coded, DecodingEvaluator
from coin.networks import linear_heads, load_network, save_network
from coin.networks.adapted import resident_nbytes, stored_nbytes
from coin.reporting import read_results
from coin.trainer.record import record_evaluation

CLASSES = (3, 2, 3)
TESTS = (23, 29, 35)  # samples
PAIR = [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]]
CODE = Code(PAIR)
EVERY = ["linear", "ridge", "feature_ridge", "expert_head"]
WITH_SURVIVORS = EVERY[:3]
# Of two rows of ten passes and a second each: the passes and seconds of the merge, the decoder's passes, the forwards
# where one expert and where two are lost, and the most losses.
COSTS = {
    ("average", "linear"): (20, 2, 0, 4, 3, 2),
    ("average", "ridge"): (20, 2, 60 * 5, 4, 3, 2),
    ("average", "feature_ridge"): (20, 2, 60 * 5, 4, 3, 2),
    ("average", "expert_head"): (20, 2, 0, 1, 1, 3),
    ("none", "ridge"): (0, 0, 60 * 3, 2, 1, 2),
    ("none", "feature_ridge"): (0, 0, 60 * 3, 2, 1, 2),
    ("oracle", "linear"): (0, 0, 0, math.nan, math.nan, math.nan),
}


def in_system(method, answers):
    """Return the answers in a method's system."""
    if method == "none":
        return answers.with_coded([])
    if method == "oracle":
        return replace(answers, coded=CODE.encode(answers.experts))
    return answers


@pytest.fixture
def data(synthetic):
    members = {
        f"task{i}": synthetic(classes, train=500, test=TESTS[i], key=i)
        for i, classes in enumerate(CLASSES)
    }
    return Tasks(members, samples_per_task=20, promise_samples=90)


@pytest.fixture
def evaluated(experts, coded, data, measure):
    """An evaluator of everything, with promises."""
    evaluator = DecodingEvaluator(experts, coded, EVERY, alpha=0.5, confidence=0.8)
    measure(evaluator, data)
    return evaluator


@pytest.fixture
def slow_loop(answers_to, data, experts, networks_of, evaluated):
    """Return a function that computes a row's numbers, its confusion and its promise from all samples at once."""
    names = list(data.tasks)
    heads = linear_heads(networks_of(experts.values()))

    def of_tasks(samples):
        return replace(answers_to(samples.inputs()), tasks=samples.part)

    calibration = of_tasks(data.calibration())
    new = of_tasks(data.promise_samples())

    def run(row):
        lost = [names.index(task) for task in row["erased"].split("+")]
        expert = names.index(row["task"])
        images, labels = data.tasks[row["task"]].splits.test[:]
        answers = in_system(row["method"], answers_to(to_input(images, 16)))
        decoder = make_decoder(row["decoder"], CODE, lost, heads)
        decoder.fit(in_system(row["method"], calibration))
        promise = decoder.accept(in_system(row["method"], new), 0.5, 0.8, CLASSES)[expert]
        decoded = decoder.decode(answers)[lost.index(expert), :, : CLASSES[expert]]
        accepted = decoder.accepted(expert, answer_score(decoded)).numpy()
        found = decoded.argmax(1).numpy()
        own = answers.experts[expert].argmax(1).numpy()
        right = own == labels.numpy()
        recovered = found == labels.numpy()
        differs = found != own
        ideal = np.einsum("rn,nbc->rbc", PAIR, answers.experts.double().numpy())
        residual = math.nan
        if row["method"] != "none":
            error = answers.coded.double().numpy() - ideal
            residual = np.linalg.norm(error) / np.linalg.norm(ideal)
        numbers = {
            "expert_accuracy": right.mean(),
            "decoded_accuracy": recovered.mean(),
            "nda": recovered.sum() / right.sum(),
            "agreement": 1 - differs.mean(),
            "residual": residual,
            "coverage": accepted.mean(),
            "found": differs[accepted].mean() if accepted.any() else math.nan,
        }
        confusion = np.zeros((CLASSES[expert], CLASSES[expert]), dtype=int)
        np.add.at(confusion, (own, found), 1)
        return numbers, confusion, promise

    return run


def test_every_number_equals_a_slow_loop_over_the_whole_test_set(evaluated, slow_loop):
    kinds = Counter()
    coverages = set()
    for each in evaluated.measurements:
        row = each.columns
        numbers, confusion, promise = slow_loop(row)
        found = {name: row[name] for name in numbers}
        # Float32 in batches of other sizes.
        assert found == pytest.approx(numbers, rel=1e-5, abs=1e-6, nan_ok=True), row
        assert each.confusion.tolist() == confusion.tolist()
        assert each.promise.coverage == pytest.approx(promise.coverage, abs=1e-9)
        assert each.promise.samples == 90
        coverages.add(row["coverage"])
        kinds[row["method"], row["decoder"]] += 1
    # Three losses of one expert and three of two, a row for each lost one.
    assert kinds == dict.fromkeys(COSTS, 3 + 3 * 2)
    assert min(coverages) == 0
    assert max(coverages) == 1


def test_costs_are_those_of_the_method_and_its_decoder(evaluated, networks_of, experts, coded):
    kept = {}
    for each in evaluated.measurements:
        row = each.columns
        key = row["method"], row["decoder"]
        merge_passes, merge_seconds, passes, of_one, of_two, losses = COSTS[key]
        names = ("merge_passes", "merge_seconds", "decoder_passes", "forwards", "losses")
        found = tuple(row[name] for name in names)
        forwards = of_two if "+" in row["erased"] else of_one
        expected = (merge_passes, merge_seconds, passes, forwards, losses)
        assert found == pytest.approx(expected, nan_ok=True)
        assert (row["decoder_seconds"] > 0) == (passes > 0)
        kept[key] = row["memory_mib"] * 2**20
    whole = sum(map(stored_nbytes, networks_of(coded)))
    heads = sum(stored_nbytes(network.fc) for network in networks_of(experts.values()))
    assert kept["average", "linear"] == whole
    assert kept["average", "expert_head"] == whole + heads + 3 * 8  # and their class counts
    # A map of all logits that arrive to each lost expert's, centred, for three losses of one and three of two.
    maps = 3 * (12 * 3 + 12 + 3) + 3 * (9 * 6 + 9 + 6)
    assert kept["average", "ridge"] == whole + 8 * maps
    assert math.isnan(kept["oracle", "linear"])


@pytest.fixture
def body(experts, write_coded, tasks, small_config, networks_of):
    """The file of a body with adapters."""
    inputs = [[task.inputs()] for task in tasks.calibrations().values()]
    method = Average(adapters={"rank": 1})
    of_all = Experts(networks_of(experts.values()), calibration=inputs)
    made = method.coded_model(of_all, [1 / 3] * 3)
    path = Path(write_coded([[1 / 3] * 3], experts, label=method.label)[0])
    provenance = load_network(path).provenance
    save_network(path, made.network, small_config, 3, provenance, made.adapters)
    return str(path)


def test_a_body_that_is_compressed_afterwards_keeps_its_adapters(body, copy_of):
    whole = load_network(Path(body)).adapters
    found = load_network(Path(copy_of(body))).adapters
    for own, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(own.tensors, expected.tensors, rtol=0, atol=0)


# Samples that an expert, a coded model and a copy look at, by task, beside the first calibration batch of 16 samples.
RUNS = {
    "with survivors": (WITH_SURVIVORS, [60 + sum(TESTS)] * 3, [60 + sum(TESTS)] * 2),
    "heads alone": (["expert_head"], [16 + samples for samples in TESTS], [sum(TESTS)] * 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_network_runs_once_on_what_is_read_of_it(name, experts, coded, copies, measure):
    decoders, of_experts, of_coded = RUNS[name]
    evaluator = DecodingEvaluator(experts, coded, decoders, replicas=copies)
    samples = Counter()
    for place, network in evaluator.networks.networks(range(8)).items():

        def count(_, inputs, __, place=place):
            samples[place] += len(inputs[0])

        network.register_forward_hook(count)
    with progress_bar("evaluation") as evaluator.progress:
        measure(evaluator)
    assert [samples[place] for place in range(8)] == [*of_experts, *of_coded, *TESTS]
    calibration = 60 if decoders == WITH_SURVIVORS else 0
    assert evaluator.progress.n == evaluator.progress.total == calibration + sum(TESTS)


def test_numbers_are_the_same_whatever_is_held(experts, coded, body, copies, measure_rows):
    numbers = []
    for memory_mib in (None, 0):
        evaluator = DecodingEvaluator(
            experts, [*coded, body], WITH_SURVIVORS, PAIR, copies, memory_mib=memory_mib
        )
        rows = measure_rows(evaluator)
        for row in rows:
            row.pop("decoder_seconds")
        numbers.append(str(rows))
    assert numbers[0] == numbers[1]
    labels = {row["method"] for row in rows}
    assert labels == {"average", "average+rank1", "none", "oracle", "replica-4bit"}


def test_copies_are_held_as_stored_and_the_largest_whole(
    experts, copies, measure_rows, networks_of
):
    rows = measure_rows(DecodingEvaluator(experts, decoders=["expert_head"], replicas=copies))
    whole = max(map(resident_nbytes, networks_of(copies)))
    assert [row["task"] for row in rows] == list(experts)
    for row in rows:
        costs = (row["decoder"], row["forwards"], row["losses"], row["code_row"])
        assert costs == ("replica", 1, 3, "")
        assert (row["resident_mib"] - row["memory_mib"]) * 2**20 == pytest.approx(whole)


def test_each_of_two_equal_experts_has_a_copy_of_its_own(experts, measure_rows, copy_of):
    shutil.copy(experts["task0"], experts["task2"])
    copies = [copy_of(path) for path in experts.values()]
    rows = measure_rows(DecodingEvaluator(experts, decoders=["expert_head"], replicas=copies))
    assert [row["task"] for row in rows] == list(experts)


@pytest.mark.parametrize("decoders", [["linear", "ridge"], ["linear", "expert_head"]])
def test_the_survivors_alone_are_measured_asked_for_or_not(decoders, experts, measure_rows):
    evaluator = DecodingEvaluator(experts, decoders=decoders)
    assert evaluator.code.matrix.tolist() == [[1 / 3] * 3]
    found = Counter((row["method"], row["decoder"]) for row in measure_rows(evaluator))
    assert found == {("none", "ridge"): 3, ("oracle", "linear"): 3}


def test_the_loss_of_every_expert_is_not_asked_of_the_survivors(
    write_experts, write_coded, tasks_of, measure_rows
):
    pair = write_experts([3, 3])
    evaluator = DecodingEvaluator(pair, write_coded([[0.7, 0.3], [0.3, 0.7]], pair), ["ridge"])
    rows = measure_rows(evaluator, tasks_of([3, 3]))
    found = {(row["method"], row["erased"], row["losses"]) for row in rows}
    every = {("average", erased, 2) for erased in ("task0", "task1", "task0+task1")}
    assert found == every | {("none", "task0", 1), ("none", "task1", 1)}


TAKEN = {"batchnorm": "recalibrate", "fisher_data": "pooled"}
POLICIES = {  # requested, what each row chose, what results say
    "both took one": ("auto", [TAKEN, TAKEN], "auto:recalibrate"),
    "each took its own": ("auto", [TAKEN, {"batchnorm": "average"}], "auto:recalibrate+average"),
    "nothing to choose": ("auto", [{}, {"converged": False}], "auto"),
    "requested": ("recalibrate", [TAKEN, TAKEN], "recalibrate"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_method_chose_is_said_of_its_variant(name, experts, coded):
    requested, chosen, told = POLICIES[name]
    for path, choice in zip(map(Path, coded), chosen, strict=True):
        file = load_network(path)
        made = {**file.provenance, "batchnorm": requested, "chosen": choice}
        save_network(path, file.network, file.config, file.num_classes, made)
    variant = DecodingEvaluator(experts, coded, ["linear"]).variants[0]
    assert variant.chosen == tuple(chosen)
    assert variant.batchnorm == told


def test_rows_of_a_code_come_in_any_order(experts, coded):
    evaluator = DecodingEvaluator(experts, coded[::-1])
    assert evaluator.variants[0].networks == (1, 0)


def test_files_and_options_that_do_not_fit_are_refused(experts, coded, copies):
    others = r"average-0\.safetensors' was made from other experts, or in another order"
    wrong = {
        "found no experts": {"experts": {}},
        "found no file": {"experts": {"task0": "nowhere.safetensors"}},
        "found decoder='cubic', expected one of linear, ridge": {"decoders": ["cubic"]},
        "found a code for 2 experts, expected 3": {"code": [[0.5, 0.5]]},
        "found memory_mib=-1, expected a whole number of at least 0": {"memory_mib": -1},
        r"found rows \[1\] of method average, expected all 2 of one code": {"coded": coded[1:]},
        r"found rows \[0, 1, 1\]": {"coded": [*coded, coded[1]]},
        r"expert\.safetensors' is no coded model": {"coded": [experts["task0"]]},
        others: {"coded": coded, "experts": {**experts, "task2": experts["task0"]}},
        f"{others}; run coin merge": {"coded": coded, "experts": dict(reversed(experts.items()))},
        "task1-4bit' is not a compressed copy of these experts, or a second one": {
            "replicas": [copies[1], copies[1]]
        },
    }
    for message, options in wrong.items():
        with pytest.raises((ConfigurationError, FileError), match=message):
            DecodingEvaluator(**({"experts": experts} | options))


def test_data_that_does_not_fit_is_refused(experts, synthetic, tasks, measure):
    reordered = Tasks(dict(reversed(tasks.tasks.items())), samples_per_task=20)
    more_classes = Tasks({**tasks.tasks, "task1": synthetic(3)})
    wrong = {
        "found data of Synthetic, expected Tasks": ("ridge", synthetic()),
        "name the same in the same order": ("ridge", reordered),
        r"'task1': 3.*expected those of the experts.*'task1': 2": ("ridge", more_classes),
        "nothing that the decoders expert_head can measure": ("expert_head", tasks),
    }
    for message, (decoder, data) in wrong.items():
        with pytest.raises(ConfigurationError, match=message):
            measure(DecodingEvaluator(experts, decoders=[decoder]), data)


@pytest.fixture
def seed_folder(evaluated, data, make_trainer, tmp_path, tmp_path_factory):
    """The folder of a run's seed with the evaluator's results, moved since."""
    record_evaluation(make_trainer(default_root_dir=tmp_path), evaluated, data, "x", {})
    return tmp_path.rename(tmp_path_factory.mktemp("moved") / "seed-0")


@pytest.mark.parametrize("kind", ["ridge", "expert_head"])
def test_a_system_of_a_run_decodes_as_it_was_evaluated(kind, seed_folder, evaluated):
    system = Coded.from_run(seed_folder, "average", kind)
    assert (system.method, system.names) == ("average", ("task0", "task1", "task2"))
    assert (system.classes, system.class_names[1]) == ([3, 2, 3], ["0", "1"])
    coded_files = [str(path.relative_to(seed_folder)) for path in system.files[3:]]
    assert coded_files == ["coded/average-0.safetensors", "coded/average-1.safetensors"]
    fitted = {
        each.decoder.erased: each.decoder
        for each in evaluated.evaluation.fitted
        if (each.variant.method, each.decoder.kind) == ("average", kind)
    }
    assert list(system.decoders) == list(fitted)
    images = torch.rand(5, 3, 16, 16)
    answers = evaluated.evaluation.answers(images, 0, range(5))
    for lost, decoder in fitted.items():
        assert system.decoders[lost].promises == decoder.promises
        decoded = system.decode(images, lost)
        expected = decoder.decode(answers)[..., : decoded.shape[2]]
        own = ~decoded.isneginf()  # classes that the expert has
        torch.testing.assert_close(decoded[own], expected[own], rtol=1e-5, atol=1e-5)


def test_the_best_system_of_a_run_is_taken_and_a_wrong_one_refused(seed_folder):
    rows = read_results(seed_folder)
    accuracies = rows[rows["method"] == "average"].groupby("decoder")["decoded_accuracy"].mean()
    kinds = {decoder.kind for decoder in Coded.from_run(seed_folder).decoders.values()}
    assert kinds == {accuracies.idxmax()}
    of_survivors = Coded.from_run(seed_folder, survivors=True)
    assert all(decoder.kind.reads_survivors for decoder in of_survivors.decoders.values())
    with pytest.raises(
        ConfigurationError, match=r"method '\*' with decoder 'cubic', expected one .*average with"
    ):
        Coded.from_run(seed_folder, decoder="cubic")
    with pytest.raises(ConfigurationError, match="found several decoders of an erasure"):
        Coded.load(seed_folder / "systems/average.safetensors", list(of_survivors.experts))
    (seed_folder / "coded/average-0.safetensors").write_bytes(b"")
    with pytest.raises(FileError, match=r"average-0.safetensors' is not the coded model that"):
        Coded.from_run(seed_folder)
    with pytest.raises(FileError, match=r"found neither 'results.csv' nor 'seed-\*/results.csv'"):
        Coded.from_run(seed_folder / "nowhere")


def test_processes_add_up_on_their_device(experts, measure, monkeypatch):
    """On a GPU: NCCL adds up nothing on the CPU."""
    evaluator = DecodingEvaluator(experts, decoders=["linear"])
    measure(evaluator)
    evaluator.to("meta")
    devices = [metric.device.type for metric in evaluator.evaluation.metrics]
    assert set(devices) == {"cpu"}  # the networks' move does not take them
    monkeypatch.setattr(type(evaluator.trainer), "world_size", 2)
    with pytest.raises(RuntimeError, match="meta"):  # which has no numbers
        evaluator.on_test_epoch_end()
    devices = [metric.device.type for metric in evaluator.evaluation.metrics]
    assert set(devices) == {"meta"}


def test_networks_are_evaluated_in_bf16_and_decoded_in_full(experts, coded, measure_rows):
    types = []

    def note(module, _, output):
        if isinstance(module, nn.Linear):
            types.append(output.dtype)

    full = measure_rows(DecodingEvaluator(experts, coded, EVERY))
    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        mixed = measure_rows(DecodingEvaluator(experts, coded, EVERY), precision="bf16-mixed")
    finally:
        hook.remove()
    assert types[:3] == [torch.float32] * 3, "heads are checked in full"
    assert set(types[3:]) == {torch.bfloat16}, "the calibration samples' answers too"
    found = [row["residual"] for row in mixed]
    expected = [row["residual"] for row in full]
    assert found != expected
    assert found == pytest.approx(expected, rel=0.05, nan_ok=True)  # bfloat16 has 8 bits
    oracle = [row["agreement"] for row in mixed if row["method"] == "oracle"]
    assert set(oracle) == {1}


def test_decoding_is_in_full_precision_whatever_products_are(experts, measure, monkeypatch):
    seen = set()
    update = DecodingAccuracy.update

    def noted(*arguments):
        seen.add(multiplies_in_bfloat16())
        update(*arguments)

    monkeypatch.setattr(DecodingAccuracy, "update", noted)
    before = torch.get_float32_matmul_precision()
    try:
        measure(DecodingEvaluator(experts, decoders=["linear"]), matmul_precision="medium")
        assert multiplies_in_bfloat16()
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {False}
