"""``coin simulate`` on a finished experiment: its files, what they say, and what it says to mistakes."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from shutil import copytree

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from coin.cli import main
from coin.commands.coded_system import Choice, read_coded_system
from coin.commands.simulate import network_bytes
from coin.errors import FileError
from coin.files.safetensors import load_state, save_state
from coin.networks import load_network
from coin.networks.compressed import compress
from coin.reporting import read_results
from coin.serving.decodings import Decodings
from coin.serving.model import NetworkServer
from coin.serving.replies import Reply
from coin.serving.sim.profile import Redundancy

pytestmark = pytest.mark.slow

GIVEN = ["--service.kind=exponential", "--service.seconds=0.01", "--jobs=1", "--queries=400"]
FAILOVER = ["--failover.accuracy=0.125", "--failover.mib=0.01", "--failover.seconds=0.002"]


MIB = 2**20


def stand_in(folder: Path, method: str, decoder: str, share: float, mib: float) -> None:
    """Add what a run with such a stand-in writes to its results: a share of the experts' accuracy, and its costs."""
    rows = pd.read_csv(folder / "results.csv", keep_default_na=False)
    like = rows[(rows["method"] == "average") & (rows["decoder"] == "ridge")]
    off = np.where(like["task"] == "digits", share - 0.01, share + 0.01)  # the worst task is a point worse
    more = like.assign(method=method, decoder=decoder, memory_mib=mib, forwards=1, losses=2, nda=off)
    more["decoded_accuracy"] = share * like["expert_accuracy"].mean()
    pd.concat([rows, more]).to_csv(folder / "results.csv", index=False)


@pytest.fixture(scope="module")
def known(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has measured coded models without survivors and compressed experts."""
    folder = tmp_path_factory.mktemp("known") / "seed-0"
    copytree(finished / "seed-0", folder)
    network = network_bytes(folder / "experts/digits/expert.safetensors") / MIB
    stand_in(folder, "average", "expert_head", 0.9, network)
    stand_in(folder, "average", "feature_ridge-alone", 0.8, 2 * network)  # no better, and larger
    stand_in(folder, "coin", "feature_ridge-alone", 0.91, 1.5 * network)
    stand_in(folder, "replica-3bit-int8base", "replica", 0.94, 0.45 * network)
    stand_in(folder, "replica-rank8", "replica", 0.95, 1.3 * network)
    return folder


@pytest.fixture(scope="module")
def simulated(known: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("simulated")
    arguments = ["--method=average", *GIVEN, *FAILOVER, "--loads=[0.2, 0.5]", "--seeds=[0, 1]"]
    with redirect_stdout(StringIO()) as printed:
        assert main(["simulate", str(known), *arguments, f"--output={folder}", "--experts=[2, 4]"]) == 0
    return folder, printed.getvalue()


VARIANTS = {
    **{kind: {"3bit-int8base", "rank8"} for kind in ("replica_delta", "neighbours")},
    "standin": {"average expert_head"},
}


def test_a_row_for_every_load_stand_in_and_number_of_experts(simulated: tuple[Path, str], known: Path) -> None:
    folder, printed = simulated
    rows = pd.read_csv(folder / "simulation.csv", keep_default_na=False)
    assert set(rows["redundancy"]) == set(Redundancy)
    for kind, group in rows.groupby("redundancy"):
        assert set(group["variant"]) == VARIANTS.get(kind, {""})
        assert len(group) == 2 * 2 * 2 * len(VARIANTS.get(kind, {""}))
    assert set(rows["seeds"]) == {2}
    assert (rows["p50"] <= rows["p999"]).all()
    assert (
        (rows["share_decoded"] > 0) == rows["redundancy"].isin(["standin", "coded_proactive", "coded_hedged"])
    ).all()
    sizes = [network_bytes(known / f"experts/{task}/expert.safetensors") for task in ("digits", "letters")]
    first = rows[rows["experts"] == 2].groupby(["redundancy", "variant"])[["memory_server", "memory"]].first()
    assert first.loc["replica", ""].memory_server == sum(sizes)
    assert first.loc["standin", "average expert_head"].memory == pytest.approx(sum(sizes) + sizes[0])
    assert first.loc["replica_delta", "rank8"].memory == pytest.approx(sum(sizes) + 1.3 * sizes[0])
    experts = [load_network(known / f"experts/{task}/expert.safetensors").network for task in ("digits", "letters")]
    kept = 0.45 * sizes[0] - compress(*experts, bits=3).nbytes  # the base, and the delta of the other one
    assert first.loc["neighbours", "3bit-int8base"].memory == pytest.approx(sum(sizes) + 2 * kept)
    delta = rows[(rows["redundancy"] == "replica_delta") & (rows["experts"] == 2)]
    assert (pd.to_numeric(delta["unpacking_seconds"]) > 0).all()
    assert f"table: {folder / 'simulation.csv'}" in printed
    assert max(len(line) for line in printed.splitlines()) <= 100 + len(str(folder))
    figures = ["simulation-load-2.png", "simulation-load-4.png", "simulation-memory.png"]
    assert sorted(path.name for path in (folder / "plots").iterdir()) == figures
    options = json.loads((folder / "simulation.json").read_text())["options"]
    assert options["conditions"]["service"] == {"kind": "exponential", "seconds": 0.01, "tail": 0.0, "marginal": None}


def test_accuracies_are_those_of_the_results_or_unknown(simulated: tuple[Path, str], known: Path) -> None:
    results = read_results(known)
    taken = json.loads((simulated[0] / "simulation.json").read_text())["options"]["decoder"]
    own = results[(results.method == "average") & (results.decoder == taken)]
    expert, decoded = own.expert_accuracy.mean(), own.decoded_accuracy.mean()
    rows = pd.read_csv(simulated[0] / "simulation.csv")
    assert rows["expert_accuracy"].unique() == pytest.approx([expert])
    shares = rows["share_decoded"] + rows["share_replicated"]
    expected = (1 - shares - rows["share_failed"]) * expert + shares * rows["standing_in_accuracy"].fillna(0)
    is_known = rows["effective_accuracy"].notna()
    np.testing.assert_allclose(rows["effective_accuracy"][is_known], expected[is_known])
    standing = rows[rows["experts"] == 2].groupby(["redundancy", rows["variant"].fillna("")])["standing_in_accuracy"]
    right = {
        ("coded_hedged", ""): decoded, ("replica", ""): expert, ("failover", ""): 0.125,
        ("neighbours", "rank8"): 0.95 * expert,
        ("standin", "average expert_head"): 0.9 * expert, ("replica_delta", "3bit-int8base"): 0.94 * expert,
    }  # fmt: skip
    assert {name: standing.first()[name] for name in right} == pytest.approx(right)
    assert set(rows["redundancy"][~is_known]) == {"coded_proactive", "coded_hedged", "standin"}
    assert set(rows["experts"][~is_known]) == {4}


def test_what_is_named_is_meant_of_coded_models_that_answer_alone_too(
    known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["simulate", str(known), *GIVEN, "--loads=[0.2]", "--seeds=[0]", "--wants=[one]", f"--output={tmp_path}"]
    assert main([*given, "--policies=[standin]", "--decoder=feature_ridge-alone"]) == 0
    assert pd.read_csv(tmp_path / "simulation.csv")["variant"].tolist() == ["coin feature_ridge-alone"]
    for chosen, policy, said in (
        ("--decoder=ridge", "standin", "feature_ridge-alone whose decoder reads no survivor; choose one of them"),
        ("--batchnorm=keep", "standin", "found batchnorm 'keep'"),
        ("--decoder=expert_head", "coded_hedged", "reads no survivor; choose another one"),
    ):
        capsys.readouterr()
        assert main([*given, f"--policies=[{policy}]", chosen]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f"coin: error: found no {policy}")
        assert said in line


@pytest.mark.filterwarnings("ignore::coin.errors.CoinWarning")
def test_times_are_measured(finished: Path, tmp_path: Path) -> None:
    arguments = ["--queries=60", "--loads=[0.2]", "--wants=[one]", "--policies=[coded_hedged]", "--jobs=1"]
    chosen = ["--method=coin", "--batchnorm=recalibrate", "--decoder=feature_ridge", f"--output={tmp_path}"]
    assert main(["simulate", str(finished / "seed-0"), *arguments, *chosen, "--seeds=[0, 1]"]) == 0
    (row,) = pd.read_csv(tmp_path / "simulation.csv").to_dict("records")
    options = json.loads((tmp_path / "simulation.json").read_text())["options"]
    assert (options["method"], options["batchnorm"], options["decoder"]) == ("coin", "recalibrate", "feature_ridge")
    times = np.array(options["service_seconds"])
    assert times.shape == (2,)
    assert (times > 0).all()
    assert row["service_seconds"] == pytest.approx(times.mean())
    assert row["decoding_seconds"] > 0
    assert options["conditions"]["service"]["marginal"] >= 0


def test_options_of_another_version_that_serving_does_not_need_are_not_read(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copytree(finished / "seed-0", copy)
    config = copy / "config.yaml"
    given = yaml.safe_load(config.read_text())
    given |= {"wandb": {"method_runs": True}, "methods": [{"class_path": "coin.Gone"}], "expert": {"gone": 1}}
    config.write_text(yaml.safe_dump(given))
    choice = Choice("coin", "keep", "feature_ridge")
    system, own = read_coded_system(copy, choice), read_coded_system(finished, choice)
    assert len(system.data().test_dataloader()) == len(own.data().test_dataloader()) == 2
    answers = {place: Reply(torch.ones(1, 10), torch.ones(1, 32)) for place in (1, 2)}
    (decoded,), (wanted,) = (
        Decodings(each.code, each.fitted_decoders()).decode(answers)[0].values() for each in (system, own)
    )
    assert torch.equal(decoded.logits, wanted.logits)


def test_a_served_system_is_that_of_the_experiment(finished: Path) -> None:
    served = read_coded_system(finished, Choice("coin", "keep", "feature_ridge"))
    assert served.tasks == ("digits", "letters")
    assert [path.name for path in served.coded] == ["coin-keep.safetensors"]
    assert served.code.matrix.tolist() == [[0.4, 0.6]]
    assert served.classes["letters"] == ["A", "B", "C", "D", "E", "F"]
    server = NetworkServer(served.coded[0], served.experts.width, served.decoder)
    assert server.feature_widths() is not None
    assert set(served.decoded_accuracy) == {1}


def test_a_policy_that_chose_is_named_by_what_was_asked_for_or_as_the_results_name_it(finished: Path) -> None:
    written = {row.batchnorm for row in read_results(finished / "seed-0").itertuples() if row.method == "coin"}
    (taken,) = (policy for policy in written if policy.startswith("auto:"))
    for named in ("auto", taken):
        served = read_coded_system(finished, Choice("coin", named, "linear"))
        assert served.batchnorm == "auto"
        assert [path.name for path in served.coded] == ["coin.safetensors"]
        assert set(served.decoded_accuracy) == {1}


def test_a_server_is_asked_by_several_threads_at_a_time(finished: Path) -> None:
    # As Ray does with queries and its own questions after the server's health.
    served = read_coded_system(finished, Choice("average", None, "feature_ridge"))
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
    "unknown policy of BatchNorm": (["simulate", "FOLDER", "--method=average", "--batchnorm=keep"], "results of auto;"),
    "what auto took": (
        ["simulate", "FOLDER", "--method=coin", "--batchnorm=average"],
        "results of auto, recalibrate, keep;",
    ),
    "no failover": (["simulate", "FOLDER", *GIVEN, "--policies=[failover]"], "--failover.accuracy"),
    "unknown policy": (["simulate", "FOLDER", "--policies=[magic]"], "magic"),
    "load": (["simulate", "FOLDER", *GIVEN, "--loads=[1.5]"], "1.5"),
    "quantile": (["simulate", "FOLDER", *GIVEN, "--quantiles=[2.0]"], "2.0"),
    "seeds": (["simulate", "FOLDER", *GIVEN, "--seeds=[1, 1]"], "[1, 1]"),
    "no mean": (["simulate", "FOLDER", "--service.kind=deterministic"], "service.seconds"),
    "mean of measured times": (["simulate", "FOLDER", "--service.seconds=1"], "measured times"),
    "share": (["simulate", "FOLDER", "--slowdown.share=1.5"], "1.5"),
    "queries": (["simulate", "FOLDER", *GIVEN, "--queries=3"], "queries=3"),
    "queries of which intervals want more": (["simulate", "FOLDER", *GIVEN, "--queries=27"], "at least 28"),
    "no loads": (["simulate", "FOLDER", *GIVEN, "--loads=[]"], "loads=[]"),
    "no policies": (["simulate", "FOLDER", *GIVEN, "--policies=[]"], "policies=[], expected one or more"),
    "a policy twice": (["simulate", "FOLDER", *GIVEN, "--policies=[copy, copy]"], "['copy', 'copy']"),
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
        read_coded_system(copy, Choice("average", None, "linear"))
    (copy / "coded/average.safetensors").unlink()
    with pytest.raises(FileError, match="no coded model of method average"):
        read_coded_system(copy, Choice("average", None, "linear"))


def test_coded_models_of_other_codes_beside_those_of_the_results_do_not_serve(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copytree(finished / "seed-0", copy)
    state, made = load_state(copy / "coded/average.safetensors")
    save_state(copy / "coded/average.row-0.safetensors", state, {**made, "code": [[0.5, 0.5], [0.9, 0.1]], "row": 0})
    save_state(copy / "coded/average.row-1.safetensors", state, {**made, "tasks": ["digits", "gone"]})
    assert [path.name for path in read_coded_system(copy, Choice("average", None, "linear")).coded] == [
        "average.safetensors"
    ]
