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
from torchmetrics import Metric

from coin.coding import Code, answer_score, make_decoder
from coin.coding.metrics import DecodingAccuracy
from coin.core.devices import multiplies_in_bfloat16
from coin.core.progress import progress_bar
from coin.data import to_input
from coin.data.tasks import Tasks
from coin.errors import CoinWarning, ConfigurationError, FileError, HeadError
from coin.merging import Average, Experts
from coin.modules import Coded, DecodingEvaluator
from coin.networks import Compression, linear_heads, load_network, save_network
from coin.networks.adapted import resident_nbytes
from coin.pipeline.steps.merge import compress_file
from coin.trainer.record import record_evaluation

CLASSES = (3, 2, 3)
TESTS = (23, 29, 35)  # samples
PAIR = [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]]
CODE = Code(PAIR)
EVERY = ["linear", "ridge", "feature_ridge", "expert_head"]
WITH_SURVIVORS = EVERY[:3]


def networks_of(paths):
    return [load_network(Path(path)).network for path in paths]


class ByHand:
    """What all networks answer to the calibration samples and to the whole test sets, and numbers of these."""

    def __init__(self, answers_to, tasks, experts):
        self.names = list(tasks.tasks)
        samples = tasks.calibration()
        self.calibration = replace(answers_to(samples.inputs()), tasks=samples.part)
        self.tests = []
        self.labels = []
        for task in tasks.tasks.values():
            images, labels = task.splits.test[:]
            self.tests.append(answers_to(to_input(images, 16)))
            self.labels.append(labels)
        self.heads = linear_heads(networks_of(experts.values()))

    def seen(self, method, answers):
        """Return the answers in a method's system."""
        if method == "none":
            return answers.with_coded([])
        if method == "oracle":
            return replace(answers, coded=CODE.encode(answers.experts))
        return answers

    def decoder(self, row):
        """Return the fitted decoder of a row of results, and which experts are lost."""
        lost = [self.names.index(task) for task in row["erased"].split("+")]
        decoder = make_decoder(row["decoder"], CODE, lost, self.heads)
        return decoder.fit(self.seen(row["method"], self.calibration)), lost

    def decoded(self, row):
        """Return the decoded logits of a row's task, the expert's and the labels."""
        expert = self.names.index(row["task"])
        decoder, lost = self.decoder(row)
        every = decoder.decode(self.seen(row["method"], self.tests[expert]))
        own = slice(0, CLASSES[expert])
        logits = every[lost.index(expert)][:, own]
        return logits, self.tests[expert].experts[expert][:, own], self.labels[expert]

    def residual(self, row):
        """Return ‖f_c − Σ β_i f_i‖ / ‖Σ β_i f_i‖ on a row's task."""
        answers = self.tests[self.names.index(row["task"])]
        ideal = np.einsum("rn,nbc->rbc", PAIR, answers.experts.double().numpy())
        error = self.seen(row["method"], answers).coded.double().numpy() - ideal
        return np.linalg.norm(error) / np.linalg.norm(ideal)

    def numbers(self, row):
        """Return the columns of results that the networks' answers say."""
        logits, own, labels = self.decoded(row)
        found, expected = logits.argmax(1), own.argmax(1)
        right = int((expected == labels).sum())
        recovered = int((found == labels).sum())
        lost = row["erased"].count("+") + 1
        is_fitted = row["decoder"] in ("ridge", "feature_ridge")
        numbers = {
            "expert_accuracy": right / len(labels),
            "decoded_accuracy": recovered / len(labels),
            "nda": recovered / right,
            "agreement": float((found == expected).double().mean()),
            "residual": self.residual(row) if row["method"] != "none" else math.nan,
        }
        costs = {  # two rows of ten passes and a second each
            "average": (20, 2, 60 * 5 * is_fitted, 2 + 3 - lost, 2),
            "none": (0, 0, 60 * 3, 3 - lost, 2),
            "oracle": (0, 0, 0, math.nan, math.nan),
        }[row["method"]]
        if row["decoder"] == "expert_head":
            costs = (20, 2, 0, 1, 3)
        names = ("merge_passes", "merge_seconds", "decoder_passes", "forwards", "losses")
        return numbers | dict(zip(names, costs, strict=True))


@pytest.fixture
def by_hand(answers_to, tasks, experts):
    tasks.setup()
    return ByHand(answers_to, tasks, experts)


def test_every_number_equals_a_slow_loop_over_the_whole_test_set(experts, coded, measure, by_hand):
    measured = measure(DecodingEvaluator(experts, coded, EVERY))
    kinds = Counter()
    for each in measured:
        row = each.columns
        for name, number in by_hand.numbers(row).items():
            # Float32 in batches of other sizes.
            assert row[name] == pytest.approx(number, rel=1e-5, abs=1e-6, nan_ok=True), (name, row)
        assert (row["decoder_seconds"] > 0) == (row["decoder_passes"] > 0)
        logits, own, _ = by_hand.decoded(row)
        confusion = np.zeros(each.confusion.shape, dtype=int)
        np.add.at(confusion, (own.argmax(1).numpy(), logits.argmax(1).numpy()), 1)
        assert each.confusion.tolist() == confusion.tolist()
        kinds[row["method"], row["decoder"]] += 1
    # Three losses of one expert and three of two, a row for each lost one.
    every = [("average", kind) for kind in EVERY]
    every += [("none", "ridge"), ("none", "feature_ridge"), ("oracle", "linear")]
    assert kinds == dict.fromkeys(every, 3 + 3 * 2)


def test_what_a_method_keeps(experts, coded, measure_rows):
    kept = {}
    for row in measure_rows(DecodingEvaluator(experts, coded, EVERY)):
        kept[row["method"], row["decoder"]] = row["memory_mib"] * 2**20
    networks = networks_of(coded)
    whole = sum(tensor.nbytes for each in networks for tensor in each.state_dict().values())
    heads = [network.fc for network in networks_of(experts.values())]
    of_heads = sum(tensor.nbytes for each in heads for tensor in each.state_dict().values())
    assert kept["average", "linear"] == whole
    assert kept["average", "expert_head"] == whole + of_heads + 3 * 8  # and their class counts
    # A map of all logits that arrive to each lost expert's, centred, for three losses of one and three of two.
    sizes = [(3 * (5 - lost), 3 * lost) for lost in (1, 1, 1, 2, 2, 2)]
    assert kept["average", "ridge"] == whole + 8 * sum(i * o + i + o for i, o in sizes)
    assert math.isnan(kept["oracle", "linear"])


@pytest.fixture
def body(experts, write_coded, tasks, small_config):
    """The file of a body with adapters."""
    networks = networks_of(experts.values())
    inputs = [[task.inputs()] for task in tasks.calibrations().values()]
    method = Average(adapters={"rank": 1})
    made = method.coded_model(Experts(networks, calibration=inputs), [1 / 3] * 3)
    path = Path(write_coded([[1 / 3] * 3], experts, label=method.label)[0])
    provenance = load_network(path).provenance
    save_network(path, made.network, small_config, 3, provenance, made.adapters)
    return str(path)


def test_a_body_that_is_compressed_afterwards_keeps_its_adapters(body, tmp_path):
    packed = tmp_path / "packed"
    compress_file(Path(body), packed, None, Compression(bits=4, base_bits=0))
    whole = load_network(Path(body)).adapters
    found = load_network(packed).adapters
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


def spoil(network, arguments):
    """Change the inputs in place as soon as the network has its own copy of them."""
    copied = arguments[0].clone()
    arguments[0].sub_(1)
    return (copied,)


@pytest.mark.parametrize("change", ["little memory", "inputs changed in place"])
def test_numbers_are_the_same_whatever_is_held_and_whatever_networks_do(
    change, experts, coded, body, copies, measure_rows
):
    files = [*coded, body]
    numbers = []
    for is_changed in (False, True):
        memory_mib = 0 if is_changed and change == "little memory" else None
        evaluator = DecodingEvaluator(
            experts, files, WITH_SURVIVORS, PAIR, copies, memory_mib=memory_mib
        )
        if is_changed and memory_mib is None:
            for network in evaluator.networks.networks(range(9)).values():
                network.register_forward_pre_hook(spoil, prepend=True)
        rows = measure_rows(evaluator)
        for row in rows:
            row.pop("decoder_seconds")
        numbers.append(rows)
    assert str(numbers[0]) == str(numbers[1])
    labels = {row["method"] for row in numbers[0]}
    assert labels == {"average", "average+rank1", "none", "oracle", "replica-4bit"}


def test_copies_are_held_as_stored_and_the_largest_whole(experts, copies, measure_rows):
    rows = measure_rows(DecodingEvaluator(experts, decoders=["expert_head"], replicas=copies))
    whole = max(map(resident_nbytes, networks_of(copies)))
    assert [row["task"] for row in rows] == list(experts)
    for row in rows:
        assert (row["decoder"], row["forwards"], row["losses"], row["code_row"]) == (
            "replica",
            1,
            3,
            "",
        )
        assert (row["resident_mib"] - row["memory_mib"]) * 2**20 == pytest.approx(whole)


def test_each_of_two_equal_experts_has_a_copy_of_its_own(experts, measure_rows, tmp_path):
    experts["task2"] = shutil.copy(experts["task0"], tmp_path / "equal")
    copies = []
    for task, path in experts.items():
        copies.append(str(tmp_path / task))
        compress_file(Path(path), Path(copies[-1]), None, Compression(bits=8, base_bits=0))
    rows = measure_rows(DecodingEvaluator(experts, decoders=["expert_head"], replicas=copies))
    assert [row["task"] for row in rows] == list(experts)
    with pytest.raises(
        FileError, match="task1' is not a compressed copy of these experts, or a second one"
    ):
        DecodingEvaluator(experts, replicas=[copies[1], copies[1]])


@pytest.mark.parametrize("decoders", [["linear", "ridge"], ["linear", "expert_head"]])
def test_the_survivors_alone_are_measured_asked_for_or_not(decoders, experts, measure_rows):
    evaluator = DecodingEvaluator(experts, decoders=decoders)
    torch.testing.assert_close(
        evaluator.code.matrix, torch.full((1, 3), 1 / 3, dtype=torch.float64)
    )
    found = Counter((row["method"], row["decoder"]) for row in measure_rows(evaluator))
    assert found == {("none", "ridge"): 3, ("oracle", "linear"): 3}


def test_the_loss_of_every_expert_is_not_asked_of_the_survivors(
    write_experts, write_coded, synthetic, measure_rows
):
    pair = write_experts([3, 3])
    data = Tasks({"task0": synthetic(key=0), "task1": synthetic(key=1)}, samples_per_task=20)
    evaluator = DecodingEvaluator(pair, write_coded([[0.7, 0.3], [0.3, 0.7]], pair), ["ridge"])
    rows = measure_rows(evaluator, data)
    erased = {(row["method"], row["erased"]) for row in rows}
    assert erased == {
        ("average", "task0"), ("average", "task1"), ("average", "task0+task1"), ("none", "task0"), ("none", "task1"),
    }  # fmt: skip
    losses = {row["method"]: row["losses"] for row in rows}
    assert losses == {"average": 2, "none": 1}


def test_heads_that_do_not_give_the_logits_are_left_out_unless_they_are_asked_for(
    experts, coded, measure, measure_rows
):
    every = DecodingEvaluator(experts, coded)
    named = DecodingEvaluator(experts, coded, ["expert_head", "linear"])
    for evaluator in (every, named):
        second = evaluator.networks.networks([1])[1]
        second.register_forward_hook(lambda _, __, logits: logits.softmax(1))
    with pytest.raises(HeadError, match="are not its head 'fc'"):
        measure(named)
    with pytest.warns(CoinWarning, match=r"^expert_head is left out: the logits of [^\n]*$"):
        rows = measure_rows(every)
    assert {row["decoder"] for row in rows} == set(WITH_SURVIVORS)


TAKEN = {"batchnorm": "recalibrate", "fisher_data": "pooled"}
POLICIES = {  # requested, what each row chose, what results say
    "both took one": ("auto", [TAKEN, TAKEN], "auto:recalibrate"),
    "each took its own": ("auto", [TAKEN, {"batchnorm": "average"}], "auto:recalibrate+average"),
    "nothing to choose": ("auto", [{}, {"converged": False}], "auto"),
    "requested": ("recalibrate", [TAKEN, TAKEN], "recalibrate"),
    "no BatchNorm": ("", [{}, {}], ""),
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


def test_coded_models_of_other_experts_or_rows_are_refused(experts, coded, small_config):
    assert DecodingEvaluator(experts, coded[::-1]).variants[0].networks == (
        1,
        0,
    )  # rows in any order
    wrong = {
        r"found rows \[1\] of method average, expected all 2 of one code": coded[1:],
        r"found rows \[0, 1, 1\]": [*coded, coded[1]],
        r"expert-0\.safetensors' is no coded model": [experts["task0"]],
    }
    for message, paths in wrong.items():
        with pytest.raises(FileError, match=message):
            DecodingEvaluator(experts, paths)
    with pytest.raises(FileError, match="in another order; run coin merge again"):
        DecodingEvaluator(dict(reversed(experts.items())), coded)
    changed = load_network(Path(experts["task1"])).network
    nn.init.zeros_(changed.fc.bias)
    save_network(Path(experts["task1"]), changed, small_config, 2, {})
    with pytest.raises(FileError, match=r"average-0\.safetensors' was made from other experts"):
        DecodingEvaluator(experts, coded)


MISTAKES = {
    "an unknown decoder": (
        {"decoders": ["cubic"]},
        "found decoder='cubic', expected one of linear, ridge",
    ),
    "no experts": ({"experts": {}}, "found no experts"),
    "another code": ({"code": [[0.5, 0.5]]}, "found a code for 2 experts, expected 3"),
    "no file": ({"experts": {"task0": "nowhere.safetensors"}}, "found no file"),
    "no memory": ({"memory_mib": -1}, "found memory_mib=-1, expected a whole number of at least 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_options_that_do_not_fit_are_refused(name, experts):
    options, message = MISTAKES[name]
    with pytest.raises((ConfigurationError, FileError), match=message):
        DecodingEvaluator(**({"experts": experts} | options))


def test_data_that_does_not_fit_is_refused(experts, synthetic, tasks, measure):
    reordered = Tasks(dict(reversed(tasks.tasks.items())), samples_per_task=20)
    more_classes = Tasks({**tasks.tasks, "task1": synthetic(3)})
    wrong = {
        "found data of Synthetic, expected Tasks": synthetic(),
        "name the same in the same order": reordered,
        r"'task1': 3.*expected those of the experts.*'task1': 2": more_classes,
    }
    for message, data in wrong.items():
        with pytest.raises(ConfigurationError, match=message):
            measure(DecodingEvaluator(experts, decoders=["ridge"]), data)
    with pytest.raises(
        ConfigurationError, match="nothing that the decoders expert_head can measure"
    ):
        measure(DecodingEvaluator(experts, decoders=["expert_head"]))


@pytest.fixture
def members(synthetic):
    return {f"task{i}": synthetic(classes, train=500, key=i) for i, classes in enumerate(CLASSES)}


def test_promises_are_made_on_each_tasks_own_new_samples(
    experts, coded, members, measure, answers_to
):
    data = Tasks(members, samples_per_task=20, promise_samples=90)
    evaluator = DecodingEvaluator(experts, coded, ["linear", "ridge"], alpha=0.5, confidence=0.8)
    measured = measure(evaluator, data)
    by_hand = ByHand(answers_to, data, experts)
    new = data.promise_samples()
    promised_on = replace(answers_to(new.inputs()), tasks=new.part)
    thresholds = []
    for each in measured:
        row = each.columns
        if row["method"] != "average":
            continue
        decoder, _ = by_hand.decoder(row)
        expert = by_hand.names.index(row["task"])
        expected = decoder.accept(promised_on, 0.5, 0.8, CLASSES)[expert]
        assert each.promise.samples == 90
        assert each.promise.coverage == pytest.approx(expected.coverage, abs=1e-9)
        threshold = -math.inf if expected.threshold is None else expected.threshold
        logits, own, _ = by_hand.decoded(row)
        accepted = answer_score(logits) <= threshold
        differs = logits.argmax(1) != own.argmax(1)
        assert row["coverage"] == pytest.approx(float(accepted.double().mean()))
        assert row["found"] == pytest.approx(float(differs[accepted].double().mean()), nan_ok=True)
        thresholds.append(threshold)
    assert len(thresholds) == 2 * (3 + 3 * 2)
    assert max(thresholds) > 0


@pytest.fixture
def seed_folder(experts, coded, members, measure, make_trainer, tmp_path):
    """The folder of a run's seed, and the evaluator that has written its results."""
    folder = tmp_path / "runs/x/seed-0"
    (folder / "coded").mkdir(parents=True)
    own_coded = [
        shutil.copy(path, folder / f"coded/average.row-{row}.safetensors")
        for row, path in enumerate(coded)
    ]
    own_experts = {}
    for name, path in experts.items():
        (folder / "experts" / name).mkdir(parents=True)
        own_experts[name] = shutil.copy(path, folder / "experts" / name / "expert.safetensors")
    data = Tasks(members, samples_per_task=20, promise_samples=90)
    evaluator = DecodingEvaluator(own_experts, own_coded, EVERY, alpha=0.5, confidence=0.8)
    measure(evaluator, data)
    record_evaluation(make_trainer(default_root_dir=folder), evaluator, data, "x", {})
    return folder, evaluator


@pytest.mark.parametrize("kind", ["ridge", "expert_head"])
def test_a_system_of_a_run_decodes_as_it_was_evaluated(kind, seed_folder):
    folder, evaluator = seed_folder
    system = Coded.from_run(folder.parent, "average", kind)
    assert (system.method, system.names, system.classes) == (
        "average",
        tuple(evaluator.experts.paths),
        [3, 2, 3],
    )
    assert system.class_names[1] == ["0", "1"]
    assert [path.name for path in system.files[3:]] == [
        f"average.row-{row}.safetensors" for row in range(2)
    ]
    assert list(system.decoders) == (CODE.erasures() if kind == "ridge" else [(0, 1, 2)])
    images = torch.rand(5, 3, 16, 16)
    answers = evaluator.evaluation.answers(images, 0, range(5))
    for each in evaluator.evaluation.fitted:
        if each.variant.method != "average" or each.decoder.kind != kind:
            continue
        lost = each.decoder.erased
        assert system.decoders[lost].promises == each.decoder.promises
        decoded = system.decode(images, lost)
        expected = each.decoder.decode(answers)
        for place, expert in enumerate(lost):
            own = slice(0, CLASSES[expert])
            torch.testing.assert_close(
                decoded[place, :, own], expected[place, :, own], rtol=1e-5, atol=1e-5
            )


def test_the_best_system_of_a_run_is_taken_and_a_wrong_one_refused(seed_folder, tmp_path):
    folder, evaluator = seed_folder
    accuracies = {}
    for each in evaluator.measurements:
        row = each.columns
        if row["method"] == "average":
            accuracies.setdefault(row["decoder"], []).append(row["decoded_accuracy"])
    kinds = {decoder.kind for decoder in Coded.from_run(folder).decoders.values()}
    best = max(accuracies, key=lambda name: np.mean(accuracies[name]))
    assert kinds == {best}
    of_survivors = Coded.from_run(folder, survivors=True)
    assert all(decoder.kind.reads_survivors for decoder in of_survivors.decoders.values())
    with pytest.raises(
        ConfigurationError, match=r"method '\*' with decoder 'cubic', expected one .*average with"
    ):
        Coded.from_run(folder, decoder="cubic")
    systems = folder / "systems/average.safetensors"
    with pytest.raises(ConfigurationError, match="found several decoders of an erasure"):
        Coded.load(systems, list(of_survivors.experts))
    (folder / "coded/average.row-0.safetensors").write_bytes(b"")
    with pytest.raises(FileError, match=r"average.row-0.safetensors' is not the coded model that"):
        Coded.from_run(folder)
    with pytest.raises(FileError, match=r"found neither 'results.csv' nor 'seed-\*/results.csv'"):
        Coded.from_run(tmp_path / "nowhere")


def test_processes_add_up_on_their_device(experts, coded, measure, monkeypatch):
    evaluator = DecodingEvaluator(experts, coded, ["linear"])
    measure(evaluator)
    moved = []
    monkeypatch.setattr(Metric, "to", lambda self, device: moved.append((self, device)))
    monkeypatch.setattr(type(evaluator.trainer), "world_size", 2)
    evaluator.on_test_epoch_end()
    every = evaluator.evaluation.metrics
    assert {id(metric) for metric, _ in moved} == {id(metric) for metric in every}
    assert {device for _, device in moved} == {evaluator.device}
    modules = list(evaluator.modules())
    assert not any(isinstance(module, Metric) for module in modules), (
        "the networks' move takes them"
    )


class HeadType:
    """Notes in which types the experts' heads run."""

    def __init__(self):
        self.found = []

    def __call__(self, module, _, output):
        if isinstance(module, nn.Linear):
            self.found.append(output.dtype)


def test_networks_are_evaluated_in_bf16_and_decoded_in_full(experts, coded, measure_rows):
    types = HeadType()
    hook = nn.modules.module.register_module_forward_hook(types)
    try:
        mixed = measure_rows(DecodingEvaluator(experts, coded, EVERY), precision="bf16-mixed")
    finally:
        hook.remove()
    assert types.found[:3] == [torch.float32] * 3, "heads are checked in full"
    assert set(types.found[3:]) == {torch.bfloat16}, "the calibration samples' answers too"
    full = measure_rows(DecodingEvaluator(experts, coded, EVERY))
    found = [row["residual"] for row in mixed]
    expected = [row["residual"] for row in full]
    assert found != expected
    assert found == pytest.approx(expected, rel=0.05, nan_ok=True)  # bfloat16 has 8 bits
    oracle = [row["agreement"] for row in mixed if row["method"] == "oracle"]
    assert set(oracle) == {1}


def test_decoding_is_in_full_precision_whatever_products_are(experts, coded, measure, monkeypatch):
    seen = set()
    update = DecodingAccuracy.update

    def noted(*arguments):
        seen.add(multiplies_in_bfloat16())
        update(*arguments)

    monkeypatch.setattr(DecodingAccuracy, "update", noted)
    before = torch.get_float32_matmul_precision()
    try:
        measure(DecodingEvaluator(experts, coded, ["linear"]), matmul_precision="medium")
        assert multiplies_in_bfloat16()
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {False}
