"""``coin simulate`` on a finished experiment: its files, what they say, and what it says to mistakes."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch

from coin.cli import main
from coin.commands.served import read_accuracies, read_served, results_folders
from coin.errors import FileError
from coin.files.safetensors import load_state, save_state
from coin.reporting import read_results, read_simulation
from coin.serving.model import NetworkServer

pytestmark = pytest.mark.slow

GIVEN = ["--service.kind=exponential", "--service.seconds=0.01", "--jobs=1", "--queries=400"]


@pytest.fixture(scope="module")
def simulated(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("simulated")
    arguments = [*GIVEN, "--loads=[0.2, 0.5]", "--seeds=[0, 1]", "--decoder=ridge", f"--output={folder}"]
    with redirect_stdout(StringIO()) as printed:
        assert main(["simulate", str(finished), *arguments, "--quantiles=[0.0, 0.9]"]) == 0
    return folder, printed.getvalue()


def test_a_row_for_every_load_policy_and_quantile(simulated: tuple[Path, str]) -> None:
    folder, printed = simulated
    rows = read_simulation(folder)
    assert len(rows) == 2 * 2 * (2 + 2 * 2)
    assert {row.servers for row in rows} == {3}
    assert {row.policy for row in rows} == {"uncoded", "replicated", "coded_proactive", "coded_hedged"}
    assert {row.seeds for row in rows} == {2}
    for row in rows:
        assert row.p50_low <= row.p50 <= row.p50_high
        assert row.p50 <= row.p99 <= row.p995 <= row.p999
        coded = row.policy.startswith("coded")
        assert (row.share_decoded > 0) == coded
        assert np.isnan(row.quantile) == (not coded)
    assert f"table: {folder / 'simulation.csv'}" in printed
    assert "coded_hedged, q = 0.9" in printed
    assert max(len(line) for line in printed.splitlines()) <= 100 + len(str(folder))
    figures = [f"simulation-{want}-{what}.png" for want in ("all", "one") for what in ("accuracy", "latency")]
    assert sorted(path.name for path in (folder / "plots").iterdir()) == figures
    options = json.loads((folder / "simulation.json").read_text())["options"]
    assert options["service"] == {"kind": "exponential", "seconds": 0.01, "tail": 0.0}


def test_effective_accuracy_is_that_of_the_results(simulated: tuple[Path, str], finished: Path) -> None:
    results = read_results(finished / "seed-0")
    own = results[(results.method == "average") & (results.decoder == "ridge")]
    expert, decoded = own.expert_accuracy.mean(), own.decoded_accuracy.mean()
    assert expert != pytest.approx(decoded, abs=0.01)
    for row in read_simulation(simulated[0]):
        assert row.method == "average"
        share, failed = row.share_decoded, row.share_failed
        assert row.effective_accuracy == pytest.approx((1 - share - failed) * expert + share * decoded)
        assert row.expert_accuracy == pytest.approx(expert)
        if share:
            assert row.decoded_accuracy == pytest.approx(decoded)


@pytest.mark.filterwarnings("ignore::coin.errors.CoinWarning")  # tests run beside one another
def test_times_are_measured(finished: Path, tmp_path: Path) -> None:
    arguments = ["--queries=60", "--loads=[0.2]", "--wants=[one]", "--policies=[coded_hedged]", "--jobs=1"]
    chosen = ["--method=coin", "--batchnorm=recalibrate", "--decoder=feature_ridge", f"--output={tmp_path}"]
    assert main(["simulate", str(finished / "seed-0"), *arguments, *chosen]) == 0
    (row,) = read_simulation(tmp_path)
    assert (row.method, row.batchnorm, row.decoder) == ("coin", "recalibrate", "feature_ridge")
    options = json.loads((tmp_path / "simulation.json").read_text())["options"]
    times = np.array(options["service_times"])
    assert times.shape == (3, 200)
    assert (times > 0).all()
    assert row.service_seconds == pytest.approx(times[:2].mean())
    assert row.decoding_seconds == options["decoding_seconds"] > 0


def test_a_served_system_is_that_of_the_experiment(finished: Path) -> None:
    served = read_served(finished, "coin", "keep", "feature_ridge")
    assert served.tasks == ("digits", "letters")
    assert [path.name for path in served.coded] == ["coin-keep.safetensors"]
    assert served.code.matrix.tolist() == [[0.4, 0.6]]
    assert served.classes["letters"] == ["A", "B", "C", "D", "E", "F"]
    server = NetworkServer(served.coded[0], served.experts.width, served.decoder)
    assert server.feature_widths() is not None
    accuracies = read_accuracies(results_folders(finished), "coin", "keep", "feature_ridge")
    assert set(accuracies.decoded) == {1}


def test_a_policy_that_chose_is_named_by_what_was_asked_for_or_as_the_results_name_it(finished: Path) -> None:
    written = {row.batchnorm for row in read_results(finished / "seed-0").itertuples() if row.method == "coin"}
    (taken,) = (policy for policy in written if policy.startswith("auto:"))
    for named in ("auto", taken):
        served = read_served(finished, "coin", named, "linear")
        assert served.batchnorm == "auto"
        assert [path.name for path in served.coded] == ["coin.safetensors"]
        assert read_accuracies(results_folders(finished), "coin", "auto", "linear").decoded.keys() == {1}


def test_a_server_is_asked_by_several_threads_at_a_time(finished: Path) -> None:
    # As Ray does with queries and its own questions after the server's health.
    served = read_served(finished, "average", None, "feature_ridge")
    server = NetworkServer(served.coded[0], served.experts.width, served.decoder)
    draw = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (1, 3, 16, 16), generator=draw, dtype=torch.uint8) for _ in range(60)]
    alone = [server(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(server, images))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.logits, other.logits)
        torch.testing.assert_close(one.features, other.features)


MISTAKES = {
    "no results": (["simulate", "nowhere"], "nowhere"),
    "unknown decoder": (["simulate", "FOLDER", "--decoder=magic"], "results of linear, ridge, feature_ridge"),
    "unknown method": (["simulate", "FOLDER", "--method=magic"], "results of average, coin, distillation"),
    "a reference": (["simulate", "FOLDER", "--method=oracle"], "results of average"),
    "unknown policy of BatchNorm": (["simulate", "FOLDER", "--method=average", "--batchnorm=keep"], "one of auto;"),
    "what auto took": (
        ["simulate", "FOLDER", "--method=coin", "--batchnorm=average"],
        "'average' of method coin, expected the policy that its run asked for, one of auto, recalibrate, keep;",
    ),
    "unknown policy": (["simulate", "FOLDER", "--policies=[magic]"], "magic"),
    "load": (["simulate", "FOLDER", *GIVEN, "--loads=[1.5]"], "1.5"),
    "quantile": (["simulate", "FOLDER", *GIVEN, "--quantiles=[2.0]"], "2.0"),
    "seeds": (["simulate", "FOLDER", *GIVEN, "--seeds=[1, 1]"], "[1, 1]"),
    "no mean": (["simulate", "FOLDER", "--service.kind=deterministic"], "service.seconds"),
    "mean of measured times": (["simulate", "FOLDER", "--service.seconds=1"], "measured"),
    "share": (["simulate", "FOLDER", "--slowdown.share=1.5"], "1.5"),
    "queries": (["simulate", "FOLDER", *GIVEN, "--queries=3"], "3 queries"),
    "queries of which intervals want more": (["simulate", "FOLDER", *GIVEN, "--queries=21"], "at least 22"),
    "no loads": (["simulate", "FOLDER", *GIVEN, "--loads=[]"], "no loads"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line(case: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, wanted = MISTAKES[case]
    assert main([argument.replace("FOLDER", str(finished)) for argument in arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("coin: error: ")
    assert wanted in line


def test_coded_models_that_are_gone_or_of_other_experts(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copytree(finished / "seed-0", copy)
    (copy / "experts/digits/expert.safetensors").write_bytes((copy / "experts/letters/expert.safetensors").read_bytes())
    with pytest.raises(FileError, match="other experts"):
        read_served(copy, "average", None, "linear")
    (copy / "coded/average.safetensors").unlink()
    with pytest.raises(FileError, match="no coded model of method average"):
        read_served(copy, "average", None, "linear")


def test_coded_models_of_other_codes_beside_those_of_the_results_do_not_serve(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copytree(finished / "seed-0", copy)
    state, made = load_state(copy / "coded/average.safetensors")
    save_state(copy / "coded/average.row-0.safetensors", state, {**made, "code": [[0.5, 0.5], [0.9, 0.1]], "row": 0})
    save_state(copy / "coded/average.row-1.safetensors", state, {**made, "tasks": ["digits", "gone"]})
    assert [path.name for path in read_served(copy, "average", None, "linear").coded] == ["average.safetensors"]
