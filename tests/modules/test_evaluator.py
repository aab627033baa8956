import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torchmetrics import Metric

from coin.coding import Answers, Code, answer_score, make_decoder
from coin.core.progress import progress_bar
from coin.data import to_input
from coin.data.tasks import Tasks
from coin.errors import ConfigurationError, FileError
from coin.evaluation.cache import NetworkCache
from coin.merging import Average, Experts
from coin.modules import Coded, DecodingEvaluator
from coin.networks import Compression, features_and_logits, load_network, save_network
from coin.networks.adapted import resident_nbytes
from coin.pipeline.steps.merge import compress_file
from coin.reporting.results import PROMISE_CSV, read_results
from coin.trainer.record import record_evaluation

CLASSES = (3, 2, 3)
PAIR = [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]]
DECODERS = ["linear", "ridge", "feature_ridge"]
TAKEN = {"batchnorm": "recalibrate", "fisher_data": "pooled"}


@pytest.fixture
def experts(write_experts):
    return write_experts(CLASSES)


@pytest.fixture
def tasks(tasks_of):
    return tasks_of(CLASSES)


def run(evaluator, tasks, make_trainer):
    make_trainer().test(evaluator, datamodule=tasks, verbose=False)
    return evaluator.measurements


def answers_of(experts, coded, inputs):
    with torch.no_grad():
        networks = [[load_network(Path(path)).network for path in group] for group in (experts, coded)]
        lots = [[features_and_logits(network, inputs) for network in group] for group in networks]
    logits = [torch.stack([torch.nn.functional.pad(own, (0, 3 - own.shape[1])) for _, own in lot]) for lot in lots]
    return Answers(logits[0], logits[1], [f for f, _ in lots[0]], [f for f, _ in lots[1]])


def answers_to_tests(experts, coded, tasks):
    tests = {name: task.splits.test[:][0] for name, task in tasks.tasks.items()}
    return {name: answers_of(experts, coded, to_input(images, 16)) for name, images in tests.items()}


def test_every_number_equals_a_slow_loop_over_the_whole_test_set(experts, write_coded, tasks, make_trainer):
    paths, code, files = write_coded(PAIR, experts), Code(PAIR), list(experts.values())
    outcomes = run(DecodingEvaluator(experts, paths, DECODERS), tasks, make_trainer)
    calibration = answers_of(files, paths, tasks.calibration().inputs())
    calibration = replace(calibration, tasks=tasks.calibration().part)
    every = answers_to_tests(files, paths, tasks)
    for outcome in outcomes:
        row = outcome.columns
        method, name, single = row["method"], row["decoder"], row["erased"] == row["task"]
        lost, place = [list(experts).index(task) for task in row["erased"].split("+")], list(experts).index(row["task"])
        test, classes = tasks.tasks[row["task"]].splits.test, CLASSES[place]
        answers, labels = every[row["task"]], test.targets
        ideal = torch.tensordot(code.matrix.float(), answers.experts, dims=1)
        residual = float((answers.coded - ideal).double().norm() / ideal.double().norm())
        seen, fitted = answers, calibration
        if method == "none":
            seen, fitted = answers.with_coded([]), calibration.with_coded([])
        elif method == "oracle":
            seen = Answers(answers.experts, ideal)
        decoder = make_decoder(name, code, lost).fit(fitted)
        decoded = decoder.decode(seen)[lost.index(place), :, :classes].argmax(1)
        own = answers.experts[place, :, :classes].argmax(1)
        right, recovered = int((own == labels).sum()), int((decoded == labels).sum())
        assert right > 0
        assert row["expert_accuracy"] == right / len(labels)
        assert row["decoded_accuracy"] == recovered / len(labels)
        assert row["nda"] == recovered / right
        assert row["agreement"] == int((decoded == own).sum()) / len(labels)
        counts = Counter(zip(own.tolist(), decoded.tolist(), strict=True))
        wanted = [[counts[expert, found] for found in range(classes)] for expert in range(classes)]
        assert outcome.confusion.tolist() == wanted
        expected = {"average": residual, "oracle": 0.0, "none": math.nan}[method]
        assert row["residual"] == pytest.approx(expected, rel=1e-5, nan_ok=True)
        if method == "oracle":
            assert [row["nda"], row["agreement"]] == [1.0, 1.0]
        # Two rows of ten passes and a second each; a regression is fitted on what all networks answer, or on what it
        # reads and the lost expert's own.
        assert (row["merge_passes"], row["merge_seconds"]) == ((20, 2) if method == "average" else (0, 0))
        assert (row["decoder_seconds"] > 0) == ("ridge" in name)
        if single:
            networks = 3 if method == "none" else 5
            assert row["decoder_passes"] == ("ridge" in name) * networks * 60
    # Three erasures of one and three of two, each lost expert measured: 3 + 6 for every variant and decoder.
    assert len(outcomes) == 9 * (3 + 2 + 1)
    assert {(o.columns["method"], o.columns["decoder"]) for o in outcomes} == {
        *(("average", decoder) for decoder in DECODERS),
        *(("none", decoder) for decoder in ("ridge", "feature_ridge")),
        ("oracle", "linear"),
    }


def test_each_network_runs_once_a_batch_and_replicas_on_their_own_task_alone(
    experts, write_coded, tasks, make_trainer, tmp_path
):
    copies = [str(tmp_path / task) for task in experts]
    for path, copy in zip(experts.values(), copies, strict=True):
        compress_file(Path(path), Path(copy), None, Compression(bits=4, base_bits=0))
    paths = [*write_coded(PAIR, experts), *write_coded(PAIR, experts, label="other")]
    evaluator = DecodingEvaluator(experts, paths, DECODERS, replicas=copies)
    networks = evaluator.networks.networks(range(10))  # experts, coded models, copies
    calls = Counter()
    for network in networks.values():
        network.register_forward_hook(lambda module, *_: calls.update([module]))
    with progress_bar("evaluation") as evaluator.progress:
        run(evaluator, tasks, make_trainer)
    tests = [len(task.test_dataloader()) for task in tasks.tasks.values()]
    assert (len(list(tasks.calibration())), tests) == (4, [3, 4, 5])
    assert [calls[network] for network in networks.values()] == [4 + 3 + 4 + 5] * 7 + tests
    assert len(evaluator.variants) == 4 + 3
    assert evaluator.progress.n == evaluator.progress.total == 60 + 23 + 29 + 35


@pytest.fixture
def body(experts, write_coded, tasks, small_config):
    """The file of a body with adapters."""
    networks = [load_network(Path(path)).network for path in experts.values()]
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
    whole, found = ([each.tensors for each in load_network(path).adapters] for path in (Path(body), packed))
    assert len(found) == 3
    for own, wanted in zip(found, whole, strict=True):
        assert own.keys() == wanted.keys()
        assert all(torch.equal(own[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("replicas", [False, True])
def test_with_expert_head_alone_an_expert_runs_on_its_own_test_set_only(
    replicas, experts, body, tasks, make_trainer, tmp_path
):
    every = run(DecodingEvaluator(experts, [body], DECODERS), tasks, make_trainer)
    copies = []
    for task, path in experts.items():
        copies.append(str(tmp_path / task))
        compress_file(Path(path), Path(copies[-1]), None, Compression(bits=4, base_bits=0))
    evaluator = DecodingEvaluator(experts, [body], ["expert_head"], replicas=copies if replicas else None)
    calls = Counter()
    networks = evaluator.networks.networks(range(4))
    networks[3] = networks[3].body
    for place, network in networks.items():
        network.register_forward_hook(lambda module, inputs, _, place=place: calls.update({place: len(inputs[0])}))
    with progress_bar("evaluation") as evaluator.progress:
        few = run(evaluator, tasks, make_trainer)
    looked_at = 16  # samples of the first calibration batch, which show whether heads give the logits
    assert {place: calls[place] - looked_at for place in range(3)} == {0: 23, 1: 29, 2: 35}
    assert calls[3] == 23 + 29 + 35
    assert evaluator.progress.n == evaluator.progress.total == 23 + 29 + 35
    names = ("task", "expert_accuracy", "decoded_accuracy", "agreement", "memory_mib")
    numbers = []
    for measurements in (every, few):
        rows = [each.columns for each in measurements if each.columns["decoder"] == "expert_head"]
        numbers.append([[row[name] for name in names] for row in rows])
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) == 3
    assert {each.columns["decoder"] for each in few} == {"expert_head", *(["replica"] if replicas else [])}


def test_where_not_all_fit_the_networks_of_one_task_alone_are_held_and_numbers_are_the_same(
    experts, body, tasks, make_trainer, tmp_path, monkeypatch
):
    copies = [str(tmp_path / task) for task in experts]
    for path, copy in zip(experts.values(), copies, strict=True):
        compress_file(Path(path), Path(copy), None, Compression(bits=4, base_bits=0))
    held, most = Counter(), Counter()
    hold = NetworkCache.hold

    def counted(self, place, network):
        hold(self, place, network)
        held.update([place])
        most[id(self)] = max(most[id(self)], len(self._held))

    monkeypatch.setattr(NetworkCache, "hold", counted)
    numbers = []
    for memory_mib in (None, 0):
        held.clear()
        most.clear()
        evaluator = DecodingEvaluator(experts, [body], ["expert_head"], replicas=copies, memory_mib=memory_mib)
        measured = run(evaluator, tasks, make_trainer)
        numbers.append([each.columns for each in measured])
        (together,) = most.values()
        assert together == (7 if memory_mib is None else 3)  # an expert, the body and the copy
        assert max(held.values()) == (1 if memory_mib is None else 2)
    for row in numbers[0]:
        if row["decoder"] == "replica":  # all as stored, and the largest of them whole to answer
            whole = max(resident_nbytes(load_network(Path(copy)).network) for copy in copies)
            assert row["resident_mib"] - row["memory_mib"] == pytest.approx(whole / 2**20)
    for row in [*numbers[0], *numbers[1]]:
        row.pop("decoder_seconds")
    assert str(numbers[0]) == str(numbers[1])
    with pytest.raises(ConfigurationError, match="found memory_mib=-1, expected a whole number of at least 0"):
        DecodingEvaluator(experts, [body], memory_mib=-1)


def test_with_survivors_all_are_held_whatever_the_bound_and_keep_their_type(experts, write_coded, tasks, make_trainer):
    coded = write_coded(PAIR, experts)
    numbers = []
    for memory_mib in (None, 0):
        evaluator = DecodingEvaluator(experts, coded, DECODERS, memory_mib=memory_mib)
        for _ in range(2):  # a second time too
            measured = run(evaluator, tasks, make_trainer)
            numbers.append([(each.columns["nda"], each.columns["residual"]) for each in measured])
    assert str(numbers[0]) == str(numbers[1]) == str(numbers[2]) == str(numbers[3])
    evaluator.networks.hold(0, evaluator.experts.network(0).double())
    evaluator.networks.move(torch.device("cpu"))
    assert next(evaluator.networks.networks([0])[0].parameters()).dtype == torch.float64


def spoil(network, arguments):
    """Change the inputs in place as soon as the network has its own copy of them."""
    copied = arguments[0].clone()
    arguments[0].sub_(1)
    return (copied,)


def test_a_network_that_changes_its_inputs_does_not_change_the_next_ones(
    experts, write_coded, tasks, make_trainer, tmp_path
):
    copies = []
    for bits in (4, 8):
        for task, path in experts.items():
            copies.append(str(tmp_path / f"{task}-{bits}"))
            compress_file(Path(path), Path(copies[-1]), None, Compression(bits=bits, base_bits=0))
    numbers = []
    for hooked in (False, True):
        evaluator = DecodingEvaluator(experts, write_coded(PAIR, experts), [*DECODERS, "expert_head"], replicas=copies)
        if hooked:
            for network in evaluator.networks.networks(range(11)).values():
                network.register_forward_pre_hook(spoil, prepend=True)
        rows = [each.columns for each in run(evaluator, tasks, make_trainer)]
        numbers.append([(row["decoder"], row["agreement"], row["decoded_accuracy"]) for row in rows])
    assert numbers[0] == numbers[1]


def test_each_of_two_equal_experts_has_a_copy_of_its_own(experts, tasks, make_trainer, tmp_path):
    experts["task2"] = shutil.copy(experts["task0"], tmp_path / "equal")
    copies = [str(tmp_path / task) for task in experts]
    for path, copy in zip(experts.values(), copies, strict=True):
        compress_file(Path(path), Path(copy), None, Compression(bits=8, base_bits=0))
    measured = run(DecodingEvaluator(experts, decoders=["expert_head"], replicas=copies), tasks, make_trainer)
    assert [each.columns["task"] for each in measured] == ["task0", "task1", "task2"]
    with pytest.raises(FileError, match="task1' is not a compressed copy of these experts, or a second one"):
        DecodingEvaluator(experts, replicas=[copies[1], copies[1]])


def test_an_evaluation_with_nothing_to_measure_is_refused(experts, tasks, make_trainer):
    with pytest.raises(ConfigurationError, match="found nothing that the decoders expert_head can measure"):
        run(DecodingEvaluator(experts, decoders=["expert_head"]), tasks, make_trainer)


def test_the_references_stand_on_any_code(write_experts, write_coded, synthetic, experts, tasks, make_trainer):
    for decoders in (["linear", "ridge"], ["linear", "expert_head"]):
        evaluator = DecodingEvaluator(experts, decoders=decoders)
        torch.testing.assert_close(evaluator.code.matrix, torch.full((1, 3), 1 / 3, dtype=torch.float64))
        outcomes = run(evaluator, tasks, make_trainer)
        found = {(o.columns["method"], o.columns["decoder"]) for o in outcomes}
        assert found == {("none", "ridge"), ("oracle", "linear")}  # the survivors alone, asked for or not
        assert len(outcomes) == 6
    pair = write_experts([3, 3])  # whose loss of both is not asked of the survivors
    evaluator = DecodingEvaluator(pair, write_coded([[0.7, 0.3], [0.3, 0.7]], pair), ["ridge"])
    two = Tasks({"task0": synthetic(key=0), "task1": synthetic(key=1)}, samples_per_task=20)
    erased = {(o.columns["method"], o.columns["erased"]) for o in run(evaluator, two, make_trainer)}
    assert {("average", "task0+task1"), ("none", "task0")} <= erased
    assert ("none", "task0+task1") not in erased


def test_coded_models_of_other_experts_or_rows_are_refused(experts, write_coded, small_config):
    coded = write_coded(PAIR, experts)
    assert DecodingEvaluator(experts, coded[::-1]).variants[0].networks == (1, 0)  # rows may come in any order
    for paths, message in (
        (coded[1:], r"found rows \[1\] of method average, expected all 2 of one code"),
        ([*coded, coded[1]], r"found rows \[0, 1, 1\]"),
        ([experts["task0"]], r"expert-0\.safetensors' is no coded model"),
    ):
        with pytest.raises(FileError, match=message):
            DecodingEvaluator(experts, paths)
    with pytest.raises(FileError, match="in another order; run coin merge again"):
        DecodingEvaluator(dict(reversed(experts.items())), coded)
    changed = load_network(Path(experts["task1"])).network
    with torch.no_grad():
        changed.fc.bias[0] += 1
    save_network(Path(experts["task1"]), changed, small_config, 2, {})
    with pytest.raises(FileError, match=r"average-0\.safetensors' was made from other experts"):
        DecodingEvaluator(experts, coded)


@pytest.mark.parametrize(
    ("asked", "chosen", "told"),
    [
        ("auto", [TAKEN, TAKEN], "auto:recalibrate"),
        ("auto", [TAKEN, {"batchnorm": "average"}], "auto:recalibrate+average"),
        ("auto", [{}, {"converged": False}], "auto"),
        ("recalibrate", [TAKEN, TAKEN], "recalibrate"),  # nothing was left to choose
        ("", [{}, {}], ""),
    ],
)
def test_what_a_method_chose_is_said_of_its_variant(experts, write_coded, asked, chosen, told):
    paths = write_coded(PAIR, experts)
    for path, choice in zip(map(Path, paths), chosen, strict=True):
        file = load_network(path)
        made = {**file.provenance, "batchnorm": asked, "chosen": choice}
        save_network(path, file.network, file.config, file.num_classes, made)
    variant = DecodingEvaluator(experts, paths, ["linear"]).variants[0]
    assert variant.chosen == tuple(chosen)
    assert variant.batchnorm == told


def test_promises_and_systems_of_a_run_are_kept(experts, write_coded, synthetic, make_trainer, tmp_path):
    seed = tmp_path / "runs/x/seed-0"
    members = {f"task{i}": synthetic(classes, train=500, key=i) for i, classes in enumerate(CLASSES)}
    tasks = Tasks(members, samples_per_task=20, promise_samples=90)
    (seed / "coded").mkdir(parents=True)
    made = enumerate(write_coded(PAIR, experts))
    coded = [shutil.copy(path, seed / f"coded/average.row-{i}.safetensors") for i, path in made]
    for name, path in experts.items():
        (seed / "experts" / name).mkdir(parents=True)
        experts[name] = shutil.copy(path, seed / "experts" / name / "expert.safetensors")
    decoders = ["linear", "ridge", "expert_head"]
    evaluator = DecodingEvaluator(experts, coded, decoders, alpha=0.5, confidence=0.8)
    run(evaluator, tasks, make_trainer)
    record_evaluation(make_trainer(default_root_dir=seed), evaluator, tasks, "x", {})

    files, new = list(experts.values()), tasks.promise_samples()
    for images, task in zip(new.stored, members.values(), strict=True):
        validation, _ = task.splits.validation[:]
        assert {image.sum().item() for image in images} <= {image.sum().item() for image in validation}
    both = tasks.calibration(), new
    fit_on, promised_on = (replace(answers_of(files, coded, each.inputs()), tasks=each.part) for each in both)
    rows, every = pd.read_csv(seed / PROMISE_CSV), answers_to_tests(files, coded, tasks)
    rows = rows[(rows.method == "average") & rows.decoder.isin(["linear", "ridge"])]
    assert len(rows) == 2 * (3 + 2 * 3)
    assert rows.threshold.notna().any()
    for row in rows.itertuples():
        lost, expert = [list(experts).index(task) for task in row.erased.split("+")], list(experts).index(row.task)
        decoder = make_decoder(row.decoder, Code(PAIR), lost).fit(fit_on)
        wanted = decoder.accept(promised_on, 0.5, 0.8, CLASSES)[expert]
        assert (row.samples, row.needed, row.alpha, row.confidence) == (90, 3, 0.5, 0.8)
        assert row.promised == pytest.approx(wanted.coverage, abs=1e-9)
        assert row.threshold == pytest.approx(math.nan if wanted.threshold is None else wanted.threshold, nan_ok=True)
        test = every[row.task]
        decoded, width = decoder.decode(test)[lost.index(expert)], CLASSES[expert]
        accepted = answer_score(decoded[:, :width]) <= row.threshold
        differs = decoded[:, :width].argmax(1) != test.experts[expert, :, :width].argmax(1)
        assert row.coverage == pytest.approx(float(accepted.double().mean()))
        assert row.found == pytest.approx(float(differs[accepted].double().mean()), nan_ok=True)

    images = torch.rand(5, 3, 16, 16)
    for name in ("ridge", "expert_head"):
        system = Coded.from_run(seed.parent, "average", name)
        assert (system.method, system.names, system.classes) == ("average", tuple(experts), list(CLASSES))
        assert list(system.decoders) == (system.code.erasures() if name == "ridge" else [(0, 1, 2)])
        for fitted in evaluator.evaluation.fitted:
            if (fitted.variant, fitted.decoder.kind) == (evaluator.variants[0], name):
                answers = evaluator.evaluation.answers(images, 0, range(5))
                lost, whole = fitted.decoder.erased, fitted.decoder.decode(answers)
                for j, logits, wanted in zip(lost, system.decode(images, lost), whole, strict=True):
                    pair = logits[:, : CLASSES[j]], wanted[:, : CLASSES[j]]
                    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)
                assert system.decoders[fitted.decoder.erased].promises == fitted.decoder.promises
    best = read_results(seed).query("method == 'average'").groupby("decoder").decoded_accuracy.mean()
    (name,) = {decoder.kind for decoder in Coded.from_run(seed).decoders.values()}
    assert best[name] == best.max()
    with pytest.raises(ConfigurationError, match=r"method '\*' with decoder 'cubic', expected one .*average with"):
        Coded.from_run(seed, decoder="cubic")
    shutil.copy(coded[1], coded[0])
    with pytest.raises(FileError, match=r"average.row-0.safetensors' is not the coded model that"):
        Coded.from_run(seed)
    with pytest.raises(FileError, match=r"found neither 'results.csv' nor 'seed-\*/results.csv'"):
        Coded.from_run(tmp_path / "nowhere")
    tasks.promised = 0
    run(evaluator, tasks, make_trainer)
    record_evaluation(make_trainer(default_root_dir=seed), evaluator, tasks, "x", {})
    assert not (seed / PROMISE_CSV).exists()


def test_what_does_not_fit_is_named(experts, synthetic, tasks, make_trainer):
    for files, options, error, message in (
        (experts, {"decoders": ["cubic"]}, ConfigurationError, "found decoder='cubic', expected one of linear, ridge"),
        ({}, {}, ConfigurationError, "found no experts"),
        (experts, {"code": [[0.5, 0.5]]}, ConfigurationError, "found a code for 2 experts, expected 3"),
        ({"task0": "nowhere.safetensors"}, {}, FileError, "found no file"),
    ):
        with pytest.raises(error, match=message):
            DecodingEvaluator(files, **options)
    evaluator = DecodingEvaluator(experts, decoders=["ridge"])
    for data, message in (
        (synthetic(), "found data of Synthetic, expected Tasks"),
        (Tasks(dict(reversed(tasks.tasks.items())), samples_per_task=20), "name the same in the same order"),
        (Tasks({**tasks.tasks, "task1": synthetic(3)}), r"'task1': 3.*expected those of the experts.*'task1': 2"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            run(evaluator, data, make_trainer)


def test_processes_add_up_on_their_device(experts, write_coded, tasks, make_trainer, monkeypatch):
    evaluator = DecodingEvaluator(experts, write_coded(PAIR, experts), ["linear"])
    run(evaluator, tasks, make_trainer)
    moved, every = [], evaluator.evaluation.metrics
    monkeypatch.setattr(Metric, "to", lambda self, device: moved.append((self, device)))
    evaluator.on_test_epoch_end()
    assert not moved, "one process has nothing to add up"
    monkeypatch.setattr(type(evaluator.trainer), "world_size", 2)
    evaluator.on_test_epoch_end()
    assert {id(metric) for metric, _ in moved} == {id(metric) for metric in every}
    assert {device for _, device in moved} == {evaluator.device}
    assert not any(isinstance(module, Metric) for module in evaluator.modules()), "the networks' move would take them"
