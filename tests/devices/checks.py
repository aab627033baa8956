"""What runs on a pretend accelerator, equal to the CPU: run by test_devices.py in a process of its own."""

from copy import deepcopy
from pathlib import Path

import pandas as pd
import pretend
import pytest
import torch
from torch import nn

import coin
from coin.cli import main
from coin.coding.metrics import DecodingAccuracy
from coin.core import devices
from coin.evaluation.cache import NetworkCache
from coin.networks import delta
from coin.networks.adapter import Change
from coin.reporting import read_results
from coin.statistics import FisherOptions
from coin.statistics.statistic import statistic_sums

torch.set_num_threads(1)
DEVICE = pretend.register()
SMALLEST = Path(__file__).parents[2] / "configs" / "experiment" / "smallest.yaml"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # the same operations on the same processor: only the order of sums may differ
METHODS = {
    "average": coin.Average(),
    "average, recalibrated": coin.Average(batchnorm="recalibrate"),
    "head_fit": coin.merging.HeadFit(),
    "base": coin.Base(),
    "coin": coin.Coin(),
    "regmean": coin.RegMean(),
    "refit": coin.Refit(),
    "refit, adapters": coin.Refit(adapters={"rank": 2}),
    "user": coin.merging.UserMethod(lambda experts, calibration, initial: deepcopy(experts[0])),
    "distillation": coin.Distillation(lr=0.01, steps=2),
}


# Without float64 merges run on the CPU and the rest as it is: what shows that is enough.
WITH_FLOAT64 = pytest.mark.parametrize("seen", [True], indirect=True, ids=["float64"])
MERGES = [(name, True) for name in METHODS]
MERGES += [(name, False) for name in ("coin", "refit, adapters", "distillation")]
DECODINGS = [(kind, True) for kind in ("linear", "ridge", "feature_ridge", "expert_head")] + [("ridge", False)]


@pytest.fixture(params=[True, False], ids=["float64", "without float64"])
def seen(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(devices, "WITHOUT_FLOAT64", {"mps", pretend.NAME})
    delta._table.cache_clear()  # whose tables are of the device as it was
    with pretend.running(float64=request.param) as found:
        yield found


class Shift(nn.Module):
    """Adds what it keeps in no file."""

    def __init__(self):
        super().__init__()
        self.register_buffer("by", torch.linspace(-0.1, 0.1, 8), persistent=False)

    def forward(self, x):
        return x + self.by


def network(seed=0):
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), Shift(), nn.Linear(8, 4),
    )  # fmt: skip
    made[1].running_mean.normal_(std=0.1)
    made[1].running_var.uniform_(0.5, 1.5)
    return made.eval()


def fleet():
    """Return three experts near a start, that start, and a batch for each expert."""
    start = network()
    experts = [deepcopy(start) for _ in range(3)]
    torch.manual_seed(1)
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return experts, start, [[torch.randn(20, 3, 8, 8)] for _ in experts]


def moved(value):
    return deepcopy(value).to(DEVICE)


def answers(net, inputs, expert=1):
    named = {"experts": expert} if isinstance(net, coin.Adapted) else {}
    with torch.no_grad():
        return net(inputs.to(next(net.parameters()).device), **named).cpu()


def test_a_metric_on_the_cpu_counts_answers_of_the_device(seen):
    metric = DecodingAccuracy()
    logits = torch.eye(3, device=DEVICE)
    metric.update(logits, logits, torch.arange(3, device=DEVICE))
    assert metric.counts.tolist() == [3, 3, 3, 0, 0, 3]


@WITH_FLOAT64
def test_held_networks_move_to_the_device(seen):
    cache = NetworkCache([network, network])
    cache.networks([0])
    cache.move(DEVICE)
    for held in cache.networks([0, 1]).values():
        assert {tensor.device for tensor in held.parameters()} == {DEVICE}


def test_files_of_the_package_alone_are_blamed(seen):
    one = torch.ones(2, device=DEVICE)
    for file in ("/home/someone/coin/lib/torch/nn.py", coin.__file__):
        exec(compile("one + one", file, "eval"), {"one": one})
    assert seen == {"__init__.py"}


@pytest.mark.parametrize(("name", "seen"), MERGES, indirect=["seen"])
def test_methods_merge_where_the_experts_are(name, seen):
    experts, start, inputs = fleet()
    code = coin.uniform(3)
    options = {"calibration": inputs, "initial": start}
    torch.manual_seed(0)
    own = coin.merge_networks(METHODS[name], experts, code, **options)
    torch.manual_seed(0)
    here = coin.merge_networks(METHODS[name], [moved(each) for each in experts], code, **options)
    assert {tensor.device for tensor in (*here[0].parameters(), *here[0].buffers())} == {DEVICE}
    close = dict.fromkeys(("rtol", "atol"), 1e-3) if "adapters" in name else CLOSE  # a code may be the next one
    torch.testing.assert_close(answers(here[0], inputs[0][0]), answers(own[0], inputs[0][0]), **close)
    assert ("merging/method.py" in seen) == devices.has_float64(DEVICE)  # else merges run on the CPU


@WITH_FLOAT64
@pytest.mark.parametrize("method", ["coin", "regmean"])
def test_statistics_of_the_cpu_serve_experts_on_the_device(method, seen):
    experts, _, inputs = fleet()
    fishers = [coin.fisher_diagonal(expert, batch) for expert, batch in zip(experts, inputs, strict=True)]
    grams = [coin.gram_sums(expert, batch).mean() for expert, batch in zip(experts, inputs, strict=True)]
    options = {"fishers": fishers, "grams": grams, "calibration": inputs}
    own = coin.merge_networks(METHODS[method], experts, coin.uniform(3), **options)
    here = coin.merge_networks(METHODS[method], [moved(each) for each in experts], coin.uniform(3), **options)
    torch.testing.assert_close(answers(here[0], inputs[0][0]), answers(own[0], inputs[0][0]), **CLOSE)


@pytest.mark.parametrize("kind", ["exact", "categorical", "monte_carlo", "gram"])
def test_statistics(kind, seen):
    experts, _, inputs = fleet()
    if kind == "gram":
        own, here = (coin.gram_sums(net, inputs[0]).mean() for net in (experts[0], moved(experts[0])))
    else:
        options = FisherOptions(kind, 2 if kind == "monte_carlo" else None)
        own, here = (statistic_sums(net, inputs[0], options).mean() for net in (experts[0], moved(experts[0])))
    for name, tensor in own.items():
        assert here[name].device == DEVICE
        torch.testing.assert_close(here[name].cpu(), tensor, **CLOSE)


@pytest.mark.parametrize(("decoder", "seen"), DECODINGS, indirect=["seen"])
def test_coded_systems_answer_decode_and_are_saved(decoder, seen, tmp_path):
    experts, start, inputs = fleet()
    code = coin.uniform(3)
    method = METHODS["refit, adapters" if decoder == "expert_head" else "average"]
    coded = coin.merge_networks(method, experts, code, calibration=inputs, initial=start)
    pooled = [torch.cat([batch for (batch,) in inputs])]
    found = []
    for place in ("cpu", DEVICE):
        system = coin.Coded(code, [deepcopy(each).to(place) for each in experts], [deepcopy(coded[0]).to(place)])
        if decoder != "linear":
            system.fit_decoder(pooled, [1], decoder)
        tests = [[(batch, expert(batch).argmax(1))] for expert, (batch,) in zip(experts, inputs, strict=True)]
        table = coin.evaluate(system, tests, decoders=[decoder], calibration=list(inputs))
        system.save(tmp_path / "system.safetensors")
        again = coin.Coded.load(tmp_path / "system.safetensors", [deepcopy(each).to(place) for each in experts])
        for each in (system, again):
            batch = inputs[1][0].to(place)
            found.append(each.decode(batch, [1]).cpu() if decoder != "linear" else torch.zeros(1))
        found.append(torch.tensor(table["nda"].to_numpy(dtype=float)))
    for own, here in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(here, own, **CLOSE)


@WITH_FLOAT64
def test_compressed_bodies_answer_where_the_experts_are(seen):
    experts, _, inputs = fleet()
    method = coin.Refit(adapters={"rank": 2}, compress={"bits": 4})
    code = coin.uniform(3)
    found = []
    for place in ("cpu", DEVICE):
        networks = [deepcopy(each).to(place) for each in experts]
        merged = coin.merge_networks(method, networks, code, calibration=inputs)
        compressed = merged.compressed["refit+rank2-4bit"]
        assert {each.levels.device.type for each in compressed[0].rounded.values()} == {"cpu"}
        system = coin.Coded(code, networks, compressed)
        system.fit_decoder([batch for (batch,) in inputs], [0, 1, 2], "expert_head")
        found.append(system.decode(inputs[1][0].to(place), [1]).cpu())
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_bodies_move_and_answer_packed(seen):
    experts, start, inputs = fleet()
    adapted = coin.fit_adapters(start, experts, inputs, rank=2)
    packed = [
        coin.Adapted(coin.compress(start, None, bits=bits, base_bits=0).packed(), adapted.adapters)
        for bits in (1, 3, 8)
    ]
    for body in (adapted, *packed):
        here = moved(body)
        experts_of = torch.tensor([0, 2, 1, 2])
        torch.testing.assert_close(answers(here, inputs[0][0]), answers(body, inputs[0][0]), **CLOSE)
        batch = inputs[0][0][:4]
        torch.testing.assert_close(answers(here, batch, experts_of), answers(body, batch, experts_of), **CLOSE)
        torch.testing.assert_close(answers(here.network(1), batch), answers(body.network(1), batch), **CLOSE)
        assert {tensor.device for tensor in here.network(1).parameters()} == {DEVICE}
    fitted = coin.fit_adapters(moved(start), [moved(each) for each in experts], inputs, rank=2)
    torch.testing.assert_close(answers(fitted, inputs[0][0]), answers(adapted, inputs[0][0]), **CLOSE)
    assert isinstance(next(iter(fitted.adapters[0].changes.values())), Change)


@WITH_FLOAT64
def test_rounding_is_the_same_bytes(seen):
    experts, start, _ = fleet()
    own = coin.compress(experts[0], start, bits=3)
    here = coin.compress(moved(experts[0]), moved(start), bits=3)
    for name, rounded in own.rounded.items():
        assert torch.equal(rounded.levels, here.rounded[name].levels)
        assert torch.equal(rounded.scale, here.rounded[name].scale)


def test_batchnorms_are_recalibrated(seen):
    own, here = network(), moved(network())
    batches = fleet()[2][0]
    assert coin.recalibrate(own, batches) == coin.recalibrate(here, batches)
    torch.testing.assert_close(here[1].running_var.cpu(), own[1].running_var, **CLOSE)


@WITH_FLOAT64
def test_batches_may_lie_elsewhere(seen):
    experts, _, inputs = fleet()
    halves = [[batch[:7], batch[7:]] for (batch,) in inputs]
    mixed = [[first, second.to(DEVICE)] for first, second in halves]
    for method in ("head_fit", "refit, adapters"):
        own = coin.merge_networks(METHODS[method], experts, coin.uniform(3), calibration=halves)
        networks = [moved(each) for each in experts]
        here = coin.merge_networks(METHODS[method], networks, coin.uniform(3), calibration=mixed)
        torch.testing.assert_close(answers(here[0], inputs[0][0]), answers(own[0], inputs[0][0]), **CLOSE)


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


@pytest.fixture
def run_on(tmp_path, monkeypatch):
    """Return a function that runs the experiment on a device, and returns its results."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "methods.yaml").write_text(RUN)

    def run(place):
        command = ["run", "-c", str(SMALLEST), "-c", str(tmp_path / "methods.yaml")]
        assert main([*command, f"--output={tmp_path / place}", f"--trainer.accelerator={place}"]) == 0
        return read_results(tmp_path / place / "smallest" / "seed-0")

    return run


@WITH_FLOAT64
def test_a_run_trains_merges_and_evaluates_on_the_device(run_on, seen):
    assert {"refit+rank2", "distillation"} <= set(run_on(pretend.NAME)["method"])
    assert {"modules/expert.py", "modules/distillation.py", "merging/units.py", "coding/answers.py"} <= seen


@pytest.mark.slow
@pytest.mark.parametrize("float64", [True, False])
def test_a_run_is_the_same(float64, run_on, monkeypatch):
    own = run_on("cpu")
    if not float64:
        monkeypatch.setattr(devices, "WITHOUT_FLOAT64", {"mps", pretend.NAME})
    delta._table.cache_clear()
    with pretend.running(float64=float64) as seen:
        here = run_on(pretend.NAME)
    numbers = ["expert_accuracy", "decoded_accuracy", "nda", "agreement", "memory_mib", "resident_mib"]
    pd.testing.assert_frame_equal(own[["method", "decoder"]], here[["method", "decoder"]])
    # Attention has another kernel on the device, and Adam's first steps make much of last bits.
    own, here = (rows[rows["method"] != "distillation"] for rows in (own, here))
    pd.testing.assert_frame_equal(own[numbers], here[numbers], rtol=1e-6)
    pd.testing.assert_series_equal(own["residual"], here["residual"], **CLOSE)
    assert "modules/expert.py" in seen
    assert ("merging/units.py" in seen) == float64  # else merges run on the CPU
