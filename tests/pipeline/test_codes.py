"""The code of an experiment: what the option takes, how a seed chooses its own, and two coded models end to end."""

import hashlib
import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from coin.cli import main
from coin.coding import Code, convex, uniform
from coin.data import Calibration, Samples
from coin.errors import ConfigurationError, DecodingError, StateError
from coin.files.safetensors import load_provenance
from coin.networks.experts import ExpertFiles
from coin.pipeline.steps.code import candidate_codes, choose_weights, read_code
from coin.reporting import read_results
from coin.reporting.summary import seed_folders

pytestmark = pytest.mark.slow

CONFIG = """
name: {name}
network: {{name: small_resnet, image_size: 16, options: {{width: 4}}}}
tasks:
  digits: {{class_path: Digits, init_args: {{max_train: 120, max_test: 77}}}}
  letters: {{class_path: Glyphs, init_args: {{classes: A-F, train_per_class: 30, test_per_class: 9}}}}
{more}
expert: {{epochs: 3, lr: 0.1, batch_size: 32}}
code: {code}
calibration: {{samples_per_task: 12, batch_size: 16}}
methods: [{methods}]
decoders: [linear, ridge, feature_ridge]
seeds: {seeds}
"""


def run(folder: Path, *extra: str, **parts: Any) -> Path:
    path = folder / f"{parts['name']}.yaml"
    path.write_text(CONFIG.format(**{"more": "", "seeds": [0], **parts}))
    assert main(["run", "-c", str(path), f"--output={folder}", *extra]) == 0
    return folder / str(parts["name"])


def test_what_the_option_stands_for() -> None:
    assert read_code(None, 3) == uniform(3)
    assert read_code(2, 3) == convex(3, 2)
    assert read_code([[0.25, 0.75]], 2) == Code([[0.25, 0.75]])
    assert read_code("auto", 2) is None


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        (3, ConfigurationError, "found 3 coded models for 2 experts, expected 1 to 2"),
        (0, ConfigurationError, "found 0 coded models for 2 experts"),
        (True, ConfigurationError, "found code True, expected R rows of N weights, a number R"),
        (0.5, ConfigurationError, "found code 0.5, expected"),
        ("best", ConfigurationError, "found code 'best', expected"),
        ([0.5, 0.5], ConfigurationError, r"the code has shape \[2\], expected R rows of N weights"),
        ([[0.2, 0.3, 0.5]], ConfigurationError, "found a code for 3 experts, expected 2"),
        ([[1.0, 0.0]], DecodingError, "the code cannot decode the loss of experts 1"),
    ],
)
def test_anything_else_is_refused(option: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        read_code(option, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("experts", [2, 3, 4, 5, 6, 8, 12, 45])
def test_candidates_are_few_and_begin_with_uniform_weights(experts: int) -> None:
    codes = candidate_codes(experts)
    assert codes[0] == uniform(experts)
    assert len(set(codes)) == len(codes) <= 40
    assert experts > 8 or len(codes) > 20
    if experts == 2:
        assert sorted(round(40 * float(code.matrix[0, 0])) for code in codes) == list(range(1, 40))


def shifted(shift: float) -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.Tanh(), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.1)
        network[1].bias.fill_(shift)
    return network


def calibration(samples: int) -> Calibration:
    images = torch.randint(0, 255, (samples, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Calibration.of(Samples.of(images, torch.zeros(samples, dtype=torch.int64)), 2, batch_size=7)


def test_the_choice_is_the_smallest_bound_on_what_averaging_leaves() -> None:
    networks = [shifted(-2.0), shifted(6.0)]
    code, table, passes = choose_weights(networks, [calibration(60), calibration(5)])
    assert passes == (50 + 5) * (2 + 39)  # at most 50 samples of a task; two experts and 39 averages
    x = torch.cat([calibration(60).inputs()[:50], calibration(5).inputs()])
    with torch.no_grad():
        for row in table:
            first, second = row["row"]
            average = shifted(-2 * first + 6 * second)
            error = average(x) - first * networks[0](x) - second * networks[1](x)
            assert row["residual"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-4)
            assert row["score"] == pytest.approx(row["residual"] / min(first, second), rel=1e-4)
    assert code.matrix[0].tolist() == min(table, key=lambda row: row["score"])["row"] != [0.5, 0.5]
    # Experts that agree leave nothing, and uniform weights amplify least.
    assert choose_weights([shifted(1.0), shifted(1.0)], [calibration(5), calibration(5)])[0] == uniform(2)
    huge = shifted(4.0)
    huge[3].weight.data.fill_(3e38)
    with pytest.raises(StateError, match="the calibration output of expert 1 is not finite"):
        choose_weights([shifted(1.0), huge], [calibration(5), calibration(5)])


AVERAGE, COIN = "{class_path: Average}", "{class_path: Coin}"
DISTILLATION = "{class_path: Distillation, init_args: {steps: 5, batch_size: 16, lr: 1.0e-3}}"


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of two seeds that choose their codes; tests leave it as it is."""
    methods = ", ".join([AVERAGE, COIN, DISTILLATION])
    return run(tmp_path_factory.mktemp("chosen"), name="chosen", code="auto", seeds=[0, 1], methods=methods)


def test_a_seed_chooses_once_and_everything_after_uses_its_code(chosen: Path) -> None:
    for seed in (0, 1):
        folder = chosen / f"seed-{seed}"
        document = json.loads((folder / "code.json").read_text())
        best = min(document["candidates"], key=lambda row: row["score"])
        assert document["matrix"] == [best["row"]]
        # Two experts and 39 averages on all samples; each average, two networks on the 5 that are held out, one of them
        # recalibrated on the other 19, and on all 24 if it is the better one.
        recalibrated, rest = divmod(document["passes"] - 24 * (2 + 39) - 39 * (2 * 5 + 19), 24)
        assert 0 <= recalibrated <= 39
        assert rest == 0
        assert document["seconds"] > 0
        configuration = json.loads((folder / "results.json").read_text())["configuration"]
        assert (configuration["code"], configuration["code_choice"]) == (document["matrix"], "auto")
        for method in ("average", "coin", "distillation"):
            made = load_provenance(folder / f"coded/{method}.safetensors")
            assert made["code"] == document["matrix"]
            assert made["shared_seconds"] >= document["seconds"]
            assert made["shared_passes"] >= document["passes"]
        rows = read_results(folder).set_index(["method", "decoder", "task"])
        made = load_provenance(folder / "coded/average.safetensors")
        assert rows.merge_passes["average", "linear", "digits"] == document["passes"] + made["passes"]
        assert (rows.merge_passes["none"] == 0).all()
        assert rows.decoder_passes["none", "ridge", "digits"] == 2 * 24
        assert (read_results(folder).query("method == 'oracle'").nda == 1).all()


def test_seeds_with_codes_of_their_own_are_one_experiment(chosen: Path) -> None:
    codes = [json.loads((chosen / f"seed-{seed}/code.json").read_text())["matrix"] for seed in (0, 1)]
    assert codes[0] != codes[1], "seeds that happen to agree test nothing; change the training"
    assert [folder.name for folder in seed_folders(chosen)] == ["seed-0", "seed-1"]
    page = (chosen / "report.html").read_text()
    shown = ", ".join(f"{weight:.3g}" for weight in codes[0][0])
    assert f"[[{shown}]], chosen from the calibration data of seed-0" in page


@pytest.mark.usefixtures("no_reports")
def test_every_seed_tells_what_it_found(chosen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(chosen, tmp_path / "chosen")
    assert main(["run", "-c", str(chosen.with_suffix(".yaml")), f"--output={tmp_path}"]) == 0
    told = [line.split(": ", 1) for line in capsys.readouterr().err.splitlines() if line.startswith("seed ")]
    assert [seed for seed, _ in told] == ["seed 0", "seed 1"]
    assert all(" lost expert" in text for _, text in told)


@pytest.mark.usefixtures("no_reports")
def test_a_choice_is_taken_up_again_and_follows_its_calibration_data(chosen: Path) -> None:
    config = chosen / "seed-0/config.yaml"
    before = (chosen / "seed-0/code.json").read_bytes()
    stamp = (chosen / "seed-0/coded/average.safetensors").stat().st_mtime_ns
    assert main(["run", "-c", str(config), f"--output={chosen.parent}"]) == 0
    assert (chosen / "seed-0/code.json").read_bytes() == before
    assert (chosen / "seed-0/coded/average.safetensors").stat().st_mtime_ns == stamp
    extra = ["--calibration.samples_per_task=9", "--name=other", "--methods=[{class_path: Average}]"]
    given = ", ".join(f"{task}: {chosen}/seed-0/experts/{task}/expert.safetensors" for task in ("digits", "letters"))
    arguments = [*extra, f"--expert.checkpoints={{{given}}}", f"--output={chosen.parent}"]
    assert main(["run", "-c", str(config), *arguments]) == 0
    passes = json.loads((chosen.parent / "other/seed-0/code.json").read_text())["passes"] - 18 * (2 + 39)
    assert passes - 39 * (2 * 4 + 14) in range(0, 39 * 18 + 1, 18)


@pytest.mark.usefixtures("no_reports")
def test_two_coded_models_decode_every_loss_of_one_and_of_two_experts(tmp_path: Path) -> None:
    third = "  bars: {class_path: Glyphs, init_args: {classes: G-L, train_per_class: 30, test_per_class: 9}}"
    methods = ", ".join([AVERAGE, COIN, DISTILLATION])
    folder = run(tmp_path, name="two", code=2, methods=methods, more=third) / "seed-0"
    tasks = ("digits", "letters", "bars")
    erasures = {"+".join(lost) for size in (1, 2) for lost in combinations(tasks, size)}
    frame = read_results(folder)
    for method in ("average", "coin", "distillation"):
        files = sorted(path.name for path in (folder / "coded").glob(f"{method}.*"))
        assert files == [f"{method}.row-{row}.safetensors" for row in (0, 1)]
        for row, name in enumerate(files):
            made = load_provenance(folder / "coded" / name)
            assert (made["row"], made["code"]) == (row, convex(3, 2).matrix.tolist())
        for decoder in ("linear", "ridge", "feature_ridge"):
            rows = frame[(frame.method == method) & (frame.decoder == decoder)]
            found = {(row.erased, row.task) for row in rows.itertuples()}
            assert found == {(erased, task) for erased in erasures for task in erased.split("+")}
            assert set(rows.code_row) == {"0+1"}
    oracle = frame[frame.method == "oracle"]
    assert set(oracle.erased) == erasures
    assert len(oracle) == 3 + 2 * 3
    assert (oracle.nda == 1).all()
    assert (oracle.agreement == 1).all()


@pytest.mark.usefixtures("no_reports")
def test_every_expert_is_read_and_hashed_once_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, hashed = [], []
    networks, digest = ExpertFiles.networks.func, hashlib.file_digest

    def counted_networks(self: ExpertFiles) -> Any:
        read.append(self)
        return networks(self)

    def counted_digest(file: Any, kind: Any) -> Any:
        hashed.append(Path(file.name))
        return digest(file, kind)

    monkeypatch.setattr(ExpertFiles.networks, "func", counted_networks)
    monkeypatch.setattr(hashlib, "file_digest", counted_digest)
    monkeypatch.setattr("coin.files.atomic._CLOCK_STEP", -1.0)  # the test is faster than the clock may be
    plain = "batchnorm: average, fisher_data"
    pooled = f"{{class_path: Coin, init_args: {{label: pooled, {plain}: pooled}}}}"
    coin = f"{{class_path: Coin, init_args: {{{plain}: own}}}}"
    methods = ", ".join([AVERAGE, coin, "{class_path: RegMean}", pooled])
    folder = run(tmp_path, name="once", code="null", methods=methods) / "seed-0"
    assert len(read) == 1
    assert len(set(hashed)) == len(hashed), "a file was hashed twice"
    # The exact diagonal takes one forward pass and a backward pass for each of an expert's classes.
    made = load_provenance(folder / "coded/pooled-average.safetensors")
    assert made["passes"] == 24 * ((1 + 2 * 10) + (1 + 2 * 6))
    made = load_provenance(folder / "coded/coin-average.safetensors")
    assert made["passes"] == 12 * ((1 + 2 * 10) + (1 + 2 * 6))
