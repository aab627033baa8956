"""What runs on a pretend accelerator, equal to the CPU: run by test_devices.py in a process of its own."""

from copy import deepcopy
from pathlib import Path

import pandas as pd
import pretend
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import coin
from coin.cli import main
from coin.coding.metrics import DecodingAccuracy
from coin.core import devices
from coin.evaluation.cache import NetworkCache
from coin.merging import HeadFit, UserMethod
from coin.networks import delta
from coin.reporting import read_results
from coin.statistics import FisherOptions
from coin.statistics.statistic import statistic_sums

torch.set_num_threads(1)
DEVICE = pretend.register()
SMALLEST = Path(__file__).parents[2] / "configs" / "experiment" / "smallest.yaml"
# The same operations on the same processor: only the order of sums may differ.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
NEXT_CODE = {"rtol": 1e-3, "atol": 1e-3}  # in 8 bits one code may be the next one
CODE = coin.uniform(3)
METHODS = {
    "average": coin.Average(batchnorm="average"),
    "average, recalibrated": coin.Average(batchnorm="recalibrate"),
    "head_fit": HeadFit(),
    "base": coin.Base(),
    "coin": coin.Coin(),
    "regmean": coin.RegMean(),
    "refit": coin.Refit(),
    "refit, adapters": coin.Refit(adapters={"rank": 2}),
    "user": UserMethod(lambda experts, calibration, initial: deepcopy(experts[0])),
    "distillation": coin.Distillation(lr=0.01, steps=2),
}
# Where merges run on the device, where they run on the CPU, and where the body is rounded.
QUICK = ("coin", "coin without float64", "refit, adapters")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name not in QUICK]


@pytest.fixture
def same(monkeypatch):
    """Return a function that compares another's results on the CPU and on the device, and gives the files that ran."""

    def run(function, *, float64=True, **tolerance):
        own = function(torch.device("cpu"))
        if not float64:
            monkeypatch.setattr(devices, "WITHOUT_FLOAT64", {"mps", pretend.NAME})
        delta._table.cache_clear()  # whose tables are of the device as it was
        with pretend.running(float64=float64) as seen:
            here = function(DEVICE)
            here = tree_map_only(torch.Tensor, torch.Tensor.cpu, here)
        torch.testing.assert_close(here, own, **(tolerance or CLOSE))
        return seen

    return run


class Shift(nn.Module):
    """Adds what it keeps in no file."""

    def __init__(self):
        super().__init__()
        self.register_buffer("by", torch.linspace(-0.1, 0.1, 8), persistent=False)

    def forward(self, x):
        return x + self.by


def network():
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), Shift(), nn.Linear(8, 4),
    )  # fmt: skip
    made[1].running_mean.normal_(std=0.1)
    made[1].running_var.uniform_(0.5, 1.5)
    return made.eval()


def experts_on(place):
    """Return three experts near a start, and that start, on a device."""
    start = network()
    torch.manual_seed(1)
    experts = [deepcopy(start) for _ in range(3)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return [expert.to(place) for expert in experts], start.to(place)


IMAGES = torch.randn(36, 3, 8, 8, generator=torch.Generator().manual_seed(2))
INPUTS = [[batch] for batch in IMAGES.split(12)]  # on the CPU, wherever the experts are


def answers(net, place, **options):
    with torch.no_grad():
        return net(IMAGES[:4].to(place), **options)


def devices_of(net):
    return {tensor.device.type for tensor in (*net.parameters(), *net.buffers())}


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_methods_merge_where_the_experts_are(name, same):
    method, _, without = name.partition(" without ")
    is_adapted = "adapters" in name

    def merge(place):
        experts, initial = experts_on(place)
        # Batches may lie on both.
        calibration = [[first[:5].to(place), first[5:]] for (first,) in INPUTS]
        torch.manual_seed(0)
        (made,) = coin.merge_networks(
            METHODS[method], experts, CODE, calibration=calibration, initial=initial
        )
        assert devices_of(made) == {place.type}
        return answers(made, place, **({"experts": 1} if is_adapted else {}))

    seen = same(merge, float64=not without, **(NEXT_CODE if is_adapted else CLOSE))
    assert ("merging/experts.py" in seen) == (not without)  # else merges run on the CPU


SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("categorical", "monte_carlo")]


@pytest.mark.parametrize("float64", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["exact", "gram", *SLOW_KINDS])
def test_statistics(kind, float64, same):
    def statistic(place):
        (expert, *_), _ = experts_on(place)
        options = None  # Gram matrices
        if kind != "gram":
            options = FisherOptions(kind, 2 if kind == "monte_carlo" else None)
        found = statistic_sums(expert, INPUTS[0], options).mean()
        assert {tensor.device.type for tensor in found.values()} == {place.type}
        return dict(found)

    same(statistic, float64=float64)


@pytest.mark.slow
def test_statistics_of_the_cpu_serve_experts_on_the_device(same):
    experts, _ = experts_on("cpu")
    grams = [coin.gram_sums(experts[place], INPUTS[place]).mean() for place in range(3)]

    def merge(place):
        (made,) = coin.merge_networks(coin.RegMean(), experts_on(place)[0], CODE, grams=grams)
        return answers(made, place)

    same(merge)


DECODINGS = [("ridge", False)]
DECODINGS += [
    pytest.param(kind, True, marks=pytest.mark.slow) for kind in ("linear", "feature_ridge")
]


@pytest.mark.parametrize(("decoder", "float64"), DECODINGS)
def test_coded_systems_answer_decode_and_are_saved(decoder, float64, same, tmp_path):
    labels = torch.arange(12) % 4
    tests = [[(batch, labels)] for (batch,) in INPUTS]

    def decoded(place):
        experts, start = experts_on(place)
        system = coin.Coded(CODE, experts, [start]).fit_decoder([IMAGES], [1], decoder)
        table = coin.evaluate(system, tests, decoders=[decoder], calibration=INPUTS)
        system.save(tmp_path / "system.safetensors")
        again = coin.Coded.load(tmp_path / "system.safetensors", experts)
        batch = IMAGES[:4].to(place)
        return [system.decode(batch), again.decode(batch), table["decoded_accuracy"].tolist()]

    same(decoded, float64=float64)


@pytest.mark.parametrize("float64", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bodies_move_and_answer_packed(float64, same):
    experts, start = experts_on("cpu")
    adapters = coin.fit_adapters(start, experts, INPUTS, rank=2).adapters
    packed = coin.compress(start, None, bits=3, base_bits=0).packed()

    def every(place):
        found = []
        for body in (start, packed):
            here = deepcopy(coin.Adapted(body, adapters)).to(place)
            plain = here.network(1)
            assert devices_of(plain) == {place.type}
            found.append(answers(here, place, experts=1))
            found.append(answers(plain, place))
            found.append(answers(here, place, experts=torch.tensor([0, 2, 1, 2])))
        return found

    same(every, float64=float64)


@pytest.mark.slow
def test_compressed_bodies_answer_where_the_experts_are(same):
    method = coin.Refit(adapters={"rank": 2}, compress={"bits": 4})

    def decoded(place):
        experts, _ = experts_on(place)
        merged = coin.merge_networks(method, experts, CODE, calibration=INPUTS)
        system = coin.Coded(CODE, experts, merged.compressed["refit+rank2-4bit"])
        system.fit_decoder([IMAGES], [0, 1, 2], "expert_head")
        return system.decode(IMAGES[:4].to(place), [1])

    same(decoded)


def test_rounding_is_the_same_bytes(same):
    def rounded(place):
        experts, start = experts_on(place)
        made = coin.compress(experts[0], start, bits=3).rounded
        return {name: (each.levels, each.scale) for name, each in made.items()}

    same(rounded, rtol=0, atol=0)


@pytest.mark.parametrize("float64", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_batchnorms_are_recalibrated(float64, same):
    def recalibrated(place):
        net = network().to(place)
        assert coin.recalibrate(net, INPUTS[0]) == 12
        return net[1].running_var

    same(recalibrated, float64=float64)


def test_a_metric_on_the_cpu_counts_answers_of_the_device():
    metric = DecodingAccuracy()
    with pretend.running():
        logits = torch.eye(3, device=DEVICE)
        metric.update(logits, logits, torch.arange(3, device=DEVICE))
    assert metric.counts.tolist() == [3, 3, 3, 0, 0, 3]


def test_held_networks_move_to_the_device():
    with pretend.running():
        cache = NetworkCache([network, network])
        cache.networks([0])
        cache.move(DEVICE)
        for held in cache.networks([0, 1]).values():
            assert devices_of(held) == {pretend.NAME}


def test_files_of_the_package_alone_are_blamed():
    with pretend.running() as seen:
        one = torch.ones(2, device=DEVICE)
        for file in ("/home/someone/coin/lib/torch/nn.py", coin.__file__):
            exec(compile("one + one", file, "eval"), {"one": one})
    assert seen == {"__init__.py"}


RUN = """
network: {name: small_vit, image_size: 32, options: {patch_size: 8, depth: 1, heads: 2, width: 16}}
base: {task: {class_path: Glyphs, init_args: {classes: K-T, train_samples: 64, validation_share: 0.1}}, epochs: 1}
tasks:
  digits: {class_path: Digits, init_args: {max_train: 80, max_test: 60}}
  letters: {class_path: Glyphs, init_args: {classes: A-J, train_per_class: 8, test_per_class: 6}}
calibration: {samples_per_task: 16}
methods:
  - {class_path: Refit, init_args: {adapters: {rank: 2}}}
  - {class_path: Distillation, init_args: {lr: 1.0e-3, steps: 2}}
decoders: [expert_head]
"""
COLUMNS = [
    "method", "decoder", "expert_accuracy", "decoded_accuracy", "nda", "agreement", "memory_mib", "resident_mib",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("float64", [True, False])
def test_a_run_is_the_same(float64, same, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "methods.yaml").write_text(RUN)
    tables = []

    def run(place):
        command = ["run", "-c", str(SMALLEST), "-c", str(tmp_path / "methods.yaml")]
        options = [f"--output={tmp_path / place.type}", f"--trainer.accelerator={place.type}"]
        assert main([*command, *options]) == 0
        rows = read_results(tmp_path / place.type / "smallest" / "seed-0")
        # Attention has another kernel on the device, and Adam's first steps make much of last bits.
        rows = rows[rows["method"] != "distillation"]
        tables.append(rows[COLUMNS])
        return rows["residual"].dropna().tolist()

    seen = same(run, float64=float64)
    pd.testing.assert_frame_equal(*tables, rtol=1e-6)
    assert {"modules/expert.py", "modules/distillation.py", "coding/answers.py"} <= seen
    assert ("merging/units.py" in seen) == float64  # else merges run on the CPU
