"""``coin serve``: the system it makes of an experiment, its mistakes, and on Ray Serve, where that is installed."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from coin.cli import main
from coin.coding import Promise
from coin.commands.export import export
from coin.commands.serve import read_system
from coin.data import Digits, Glyphs
from coin.data.transform import to_input
from coin.errors import CoinWarning, ConfigurationError, FileError
from coin.modules import Coded
from coin.networks import Compression, load_network
from coin.pipeline.steps.merge import compress_file
from coin.reporting import read_results, standins
from coin.reporting.choice import recommended
from coin.reporting.summary import read_run
from coin.serving.front_end import FrontEnd
from coin.serving.limits import Limits
from coin.serving.policies import PolicyKind
from coin.serving.servers import Reply
from coin.serving.system import Answer, System
from tests.serving.conftest import ask_all, ask_one

EXPERTS = ["expert-digits", "expert-letters"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def images() -> Tensor:
    return torch.randint(
        256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def read(
    folder: Path, method: str | None = None, decoder: str | None = None, policy: str | None = None
) -> System:
    return read_system(str(folder), method, decoder, policy and PolicyKind(policy), 0.8)


def front_end(system: System, *lost: str) -> FrontEnd:
    """Return a front end with the networks in this process, some of which are lost."""
    network_of = system.reader()

    def serve(name: str) -> Any:
        async def ask(expert: int, images: Tensor) -> Reply:
            if name in lost:
                raise RuntimeError("killed")
            return network_of(system.files[name][expert])(images, expert)

        return ask

    servers = {name: serve(name) for name in system.files}
    return FrontEnd(system, servers, Limits(timeout=60.0, deadline=60.0))


def answer(system: System, images: Tensor, expert: int, *lost: str) -> Answer:
    return asyncio.run(ask_one(front_end(system, *lost), images, expert))


def accuracies(system: System, *lost: str) -> list[float]:
    """Return the accuracy of every expert's answers on its test images."""
    digits = Digits(max_train=120, max_test=77, image_size=16)
    letters = Glyphs(classes="A-F", train_per_class=30, test_per_class=9, image_size=16)
    found = []
    for expert, task in enumerate((digits, letters)):
        images, labels = task.splits.test[:]
        given = answer(system, images, expert, *lost)
        assert given.decoded == (EXPERTS[expert] in lost)
        is_right = given.logits[:, : task.num_classes].argmax(1) == labels
        found.append(float(is_right.float().mean()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "method", "decoder", "policy"),
    [
        ("finished", "coin", "linear", "coded_hedged"),
        ("finished", "coin", "feature_ridge", "coded_hedged"),
        ("alone", "coin", "expert_head", "standin"),
        ("alone", "coin-8bit", "expert_head", "standin"),
        ("alone", "refit+rank2", "expert_head", "standin"),
    ],
)
def test_what_is_served_is_as_accurate_as_the_results_say(
    request: pytest.FixtureRequest, run: str, method: str, decoder: str, policy: str
) -> None:
    folder = request.getfixturevalue(run)
    system = read(folder, method, decoder)
    assert system.stand_ins.policy == policy  # the default for the decoder
    assert list(system.files) == [*EXPERTS, "coded-0"]
    results = (
        read_results(folder / "seed-0")
        .query("method == @method and decoder == @decoder")
        .sort_values("task")
    )
    best = results.groupby("batchnorm").decoded_accuracy.mean().idxmax()
    rows = results[results.batchnorm == best]
    own = rows.expert_accuracy.tolist()
    decoded = rows.decoded_accuracy.tolist()
    assert accuracies(system) == pytest.approx(own)
    assert accuracies(system, EXPERTS[0]) == pytest.approx([decoded[0], own[1]])
    if policy == "standin":
        assert accuracies(system, *EXPERTS) == pytest.approx(decoded)


def test_what_is_served_by_default_is_what_is_recommended_of_what_the_policy_can_use(
    alone: Path,
) -> None:
    kept = standins(read_run(alone)[1])
    kept = kept[~kept.method.str.startswith(("none", "replica"))]
    row = recommended(kept)
    served = read(alone)
    assert served.variant == f"{row.method}, {row.decoder}"
    assert list(served.classes) == ["digits", "letters"]
    assert Coded.from_run(alone).method == row.method
    row = recommended(kept[kept.decoder == "expert_head"])
    assert read(alone, policy="standin").variant == f"{row.method}, {row.decoder}"
    assert read(alone, policy="coded_proactive").variant.endswith(", linear")


MISTAKES = {
    "a decoder": (["coin", "magic"], "with decoder 'magic'"),
    "a decoder of survivors alone": (
        ["coin", "linear", "standin"],
        "a decoder that reads none, such as expert_head",
    ),
    "a decoder of survivors": (
        ["coin", "expert_head", "coded_hedged"],
        "a decoder that reads the survivors, such as",
    ),
    "no copies": (["replica-3bit"], "digits.3bit.safetensors"),
    "copies with a decoder": (["replica-3bit", "ridge"], "expected policy replica"),
    "copies with a policy": (["replica-3bit", None, "standin"], "expected policy replica"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_the_run_or_the_policy_has_not_is_refused(name: str, alone: Path) -> None:
    options, message = MISTAKES[name]
    with pytest.raises((ConfigurationError, FileError), match=message):
        read(alone, *options)


def test_without_ray_is_one_line(alone: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, module, None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert main(["serve", str(alone), f"--ray.port={port}"]) == 2
    assert "pip install '.[serve]'" in capsys.readouterr().err.splitlines()[-1]


def test_a_port_that_is_taken_is_refused_before_anything_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as Ray's proxies do
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", ".", f"--ray.port={port}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"coin: error: found 127.0.0.1:{port} in use (")


def test_where_experts_are_too_weak_to_recommend_anything_a_warning_says_what_is_served(
    alone: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(alone, tmp_path / "run")
    path = folder / "seed-0/results.csv"
    results = pd.read_csv(path)
    results["expert_accuracy"] = results["chance"]
    results.to_csv(path, index=False)
    with pytest.warns(CoinWarning, match="nothing can be recommended: the expert of") as found:
        system = read_system(str(folder), None, None, None, 0.8)
    assert len(found) == 1
    assert f"; serving {system.variant} all the same" in str(found[0].message)


def test_one_expert_of_a_body_with_adapters_is_exported(
    alone: Path, tmp_path: Path, images: Tensor
) -> None:
    body = alone / "seed-0/coded/refit+rank2.safetensors"
    made = load_network(export(body, tmp_path / "letters", expert="letters"))
    served = answer(read(alone, "refit+rank2", "expert_head"), images, 1, *EXPERTS)
    with torch.no_grad():
        found = made.network(to_input(images, 16))
    torch.testing.assert_close(found, served.logits[:, :6].float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        (
            "refit+rank2",
            {"peft": True},
            r"found a scale or bias of .*, expected plain LoRA for peft",
        ),
        ("refit+rank2", {}, "expected one of digits, letters; give --expert"),
        (
            "refit+rank2",
            {"expert": "cats"},
            "expected one of digits, letters; give --expert",
        ),
        ("coin", {"expert": "letters"}, "found no adapters in"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    file: str, options: dict[str, Any], message: str, alone: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        export(alone / f"seed-0/coded/{file}.safetensors", tmp_path / "out", **options)


def test_what_a_promise_covers_is_told(alone: Path, images: Tensor) -> None:
    system = read(alone, "coin", "expert_head")
    (decoder,) = system.decoders.values()
    decoder.promises = {0: Promise(0.5, 0.02, 0.95, 1.0, 9, 9)}
    first, second = asyncio.run(ask_all(front_end(system, *EXPERTS), images))
    scores = 1 - first.logits[:, :10].double().softmax(1).amax(1)
    assert torch.equal(first.accepted, scores <= 0.5)
    assert not second.accepted.any()


def test_a_replica_holds_every_expert_and_answers_like_them(finished: Path, images: Tensor) -> None:
    system = read(finished, "coin", "feature_ridge", "replica")
    assert list(system.files) == [*EXPERTS, "replica-0"]
    assert list(read(finished, "coin", "feature_ridge", "uncoded").files) == EXPERTS
    replica = answer(system, images, 0, EXPERTS[0])
    assert (replica.decoded, replica.answered_by) == (False, ("replica-0",))
    torch.testing.assert_close(replica.logits, answer(system, images, 0).logits)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that returns the 4-bit copy of a task's expert, in a copy of the run."""
    shutil.copytree(finished, tmp_path / "tiny")

    def copy(task: str) -> Path:
        path = tmp_path / f"tiny/seed-0/replicas/{task}.4bit.safetensors"
        if not path.is_file():
            expert = tmp_path / f"tiny/seed-0/experts/{task}/expert.safetensors"
            compress_file(expert, path, None, Compression(4, 0))
        return path

    return copy


def test_compressed_copies_answer_as_their_networks(
    copied: Any, tmp_path: Path, images: Tensor
) -> None:
    files = [load_network(copied(task)) for task in ("digits", "letters")]
    system = read(tmp_path / "tiny", "replica-4bit")
    assert (system.stand_ins.policy, system.variant) == ("replica", "replica-4bit")
    for expert, file in enumerate(files):
        given = answer(system, images, expert, *EXPERTS)
        assert given.answered_by == ("replica-0",)
        with torch.no_grad():
            expected = file.network(to_input(images, 16))
        torch.testing.assert_close(given.logits[:, : file.num_classes], expected)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists(), reason="it finds the servers' processes in /proc"
)
def test_on_ray_clients_get_answers_while_experts_are_killed(alone: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray Serve is not installed: pip install '.[serve]'")
    benchmark = [
        str(ROOT / "notebooks/benchmarks/failover.py"),
        str(alone),
        f"--output={tmp_path}",
        "--repeats=1",
    ]
    phases = [
        "--setups",
        "standin-packed",
        "--events",
        "1",
        "--loads",
        "--warmup=2",
        "--before=3",
        "--after=4",
    ]
    command = [sys.executable, *benchmark, *phases, "--images=24", "--clients=20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "all as it should be" in found.stdout
    accuracy = pd.read_csv(tmp_path / "accuracy.csv")
    assert accuracy["lost"].tolist() == [0, 1, 2]
    assert accuracy["failed"].tolist() == [0, 0, 0]
