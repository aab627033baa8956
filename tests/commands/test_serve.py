"""``coin serve``: the system it makes of an experiment, its mistakes, and on Ray Serve, where that is installed."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from coin.cli import main
from coin.coding import Promise
from coin.commands.export import export
from coin.commands.serve import read_system
from coin.data import Digits, Glyphs
from coin.data.tasks import Tasks
from coin.data.transform import to_input
from coin.errors import ConfigurationError
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
from coin.serving.system import System
from tests.serving.conftest import ask_all, ask_one


def read(
    folder: Path, policy: str | None = None, decoder: str | None = "feature_ridge", method: str | None = "coin"
) -> System:
    return read_system(str(folder), method, decoder, policy and PolicyKind(policy), 0.8)


def front_end(system: System, *lost: str) -> FrontEnd:
    """Return a front end with the networks in this process, some of which are lost."""

    network_of = system.reader()

    def serve(name: str) -> Any:
        async def ask(expert: int, images: torch.Tensor) -> Reply:
            if name in lost:
                raise RuntimeError("killed")
            return network_of(system.files[name][expert])(images, expert)

        return ask

    servers = {name: serve(name) for name in system.files}
    return FrontEnd(system, servers, Limits(timeout=60.0, deadline=60.0))


def accuracies(system: System, *lost: str) -> list[float]:
    """Return the accuracy of every expert's answers on its test images."""
    tasks = {
        "digits": Digits(max_train=120, max_test=77, image_size=16),
        "letters": Glyphs(classes="A-F", train_per_class=30, test_per_class=9, image_size=16),
    }
    data = Tasks(tasks)
    data.prepare_data()
    data.setup()

    async def ask() -> list[float]:
        front, found = front_end(system, *lost), []
        for expert, task in enumerate(tasks.values()):
            right = []
            for images, labels in task.test_dataloader():
                answer = await ask_one(front, images, expert)
                assert answer.decoded == (system.stand_ins.experts[expert] in lost)
                right.append(answer.logits[:, : task.num_classes].argmax(1) == labels)
            found.append(float(torch.cat(right).float().mean()))
        return found

    return asyncio.run(ask())


SERVED = [
    ("coin", "linear", "coded_hedged"), ("coin", "feature_ridge", "coded_hedged"), ("coin", "expert_head", "standin"),
    ("coin-8bit", "expert_head", "standin"), ("refit+rank2", "expert_head", "standin"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("method", "decoder", "policy"), SERVED)
def test_what_is_served_is_as_accurate_as_the_results_say(
    request: pytest.FixtureRequest, method: str, decoder: str, policy: str
) -> None:
    folder = request.getfixturevalue("finished" if decoder in ("linear", "feature_ridge") else "alone")
    system = read(folder, None, decoder, method)
    assert system.stand_ins.policy == policy  # the default for the decoder
    assert list(system.files) == ["expert-digits", "expert-letters", "coded-0"]
    results = read_results(folder / "seed-0").query("method == @method and decoder == @decoder").sort_values("task")
    best = results.groupby("batchnorm").decoded_accuracy.mean().idxmax()
    rows = results[results.batchnorm == best]
    own, decoded = rows.expert_accuracy.tolist(), rows.decoded_accuracy.tolist()
    assert accuracies(system) == pytest.approx(own)
    assert accuracies(system, "expert-digits") == pytest.approx([decoded[0], own[1]])
    if policy == "standin":
        assert accuracies(system, "expert-digits", "expert-letters") == pytest.approx(decoded)


def test_what_is_served_by_default_is_what_is_recommended_of_what_the_policy_can_use(
    alone: Path, finished: Path
) -> None:
    kept = standins(read_run(alone)[1])
    kept = kept[~kept["method"].str.startswith(("none", "replica"))]
    own = kept[kept["decoder"] == "expert_head"]
    row = recommended(own)
    assert read(alone, "standin", None, None).variant == f"{row['method']}, {row['decoder']}"
    row = recommended(kept)
    system = Coded.from_run(alone)
    assert (system.method, next(iter(system.decoders.values())).kind) == (row["method"], row["decoder"])
    served = read(alone, None, None, None)
    assert served.variant == f"{row['method']}, {row['decoder']}"
    assert list(served.classes) == ["digits", "letters"]
    assert read(alone, "coded_proactive", None, None).variant.endswith(", linear")
    for folder, policy, decoder, told in (
        (alone, "standin", "linear", "expected a decoder that reads none, such as expert_head"),
        (finished, "standin_lost", None, "expected a decoder that reads none, such as expert_head"),
        (alone, "coded_hedged", "expert_head", "expected a decoder that reads the survivors, such as ridge"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            read(folder, policy, decoder)


def test_one_expert_of_a_body_with_adapters_is_exported(alone: Path, tmp_path: Path) -> None:
    body = alone / "seed-0/coded/refit+rank2.safetensors"
    made = load_network(export(body, tmp_path / "letters", expert="letters"))
    system = read(alone, "standin", "expert_head", "refit+rank2")
    images = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        own = system.network(system.files["coded-0"][1])(images, system.stand_ins.asked_as("coded-0", 1))
        expected = system.decode(1, {"coded-0": own}).logits
        found = made.network(to_input(images, 16))
    torch.testing.assert_close(found, expected[:, :6].float(), rtol=1e-2, atol=1e-2)
    with pytest.raises(ConfigurationError, match=r"found a scale or bias of .*, expected plain LoRA for peft"):
        export(body, tmp_path / "peft", peft=True)
    for wrong in (None, "cats"):
        with pytest.raises(ConfigurationError, match=r"with experts \['digits', 'letters'\], expected one of these"):
            export(body, expert=wrong)
    with pytest.raises(ConfigurationError, match=r"with experts \[\], expected"):
        export(body.with_name("coin.safetensors"), expert="letters")


def test_what_a_promise_covers_is_told(alone: Path) -> None:
    system = read(alone, "standin", "expert_head")
    (decoder,) = system.decoders.values()
    decoder.promises = {0: Promise(0.5, 0.02, 0.95, 1.0, 9, 9)}
    images = torch.randint(256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    first, second = asyncio.run(ask_all(front_end(system, "expert-digits", "expert-letters"), images))
    scores = 1 - first.logits[:, :10].double().softmax(1).amax(1)
    assert torch.equal(first.accepted, scores <= 0.5)
    assert not second.accepted.any()


def test_a_replica_holds_every_expert_and_answers_like_them(finished: Path) -> None:
    system = read(finished, "replica")
    names = ["expert-digits", "expert-letters", "replica-0"]
    assert list(system.files) == names
    assert system.files["replica-0"] == [system.files[name][0] for name in names[:2]]
    assert list(read(finished, "uncoded").files) == names[:2]
    images = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    own = asyncio.run(ask_one(front_end(system), images, 0))
    replica = asyncio.run(ask_one(front_end(system, "expert-digits"), images, 0))
    assert (replica.decoded, replica.answered_by) == (False, ("replica-0",))
    torch.testing.assert_close(own.logits, replica.logits)


@pytest.fixture(scope="module")
def copied(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment with 4-bit copies of its experts."""
    folder = tmp_path_factory.mktemp("copied") / "tiny"
    shutil.copytree(finished, folder)
    for task in ("digits", "letters"):
        expert = folder / f"seed-0/experts/{task}/expert.safetensors"
        compress_file(expert, folder / f"seed-0/replicas/{task}.4bit.safetensors", None, Compression(4, 0))
    return folder


def test_compressed_copies_answer_as_their_networks_and_one_is_kept_unpacked(copied: Path) -> None:
    images = torch.randint(256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    system = read(copied, decoder=None, method="replica-4bit")
    assert (system.stand_ins.policy, system.variant) == ("replica", "replica-4bit")
    read_network = system.reader()
    for place, task in (*enumerate(system.classes), *enumerate(system.classes)):
        logits = read_network(system.files["replica-0"][place])(images).logits
        file = load_network(copied / f"seed-0/replicas/{task}.4bit.safetensors")
        with torch.no_grad():
            expected = file.network(to_input(images, 16))
        torch.testing.assert_close(logits[:, : file.num_classes], expected)
    about = read_network.cache_info()
    assert (about.currsize, about.misses) == (1, 4)
    answer = asyncio.run(ask_one(front_end(system, "expert-letters"), images, 1))
    assert answer.answered_by == ("replica-0",)


MISTAKES = {
    "no results": (["nowhere"], "nowhere"),
    "decoder": (["FOLDER", "--decoder=magic"], "magic"),
    "port": (["FOLDER", "--ray.port=0"], "port=0"),
    "no copies": (["FOLDER", "--method=replica-3bit"], "digits.3bit.safetensors"),
    "copies and a policy": (["FOLDER", "--method=replica-3bit", "--policy=standin"], "expected policy replica"),
    "no Ray": (["FOLDER"], "pip install '.[serve]'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line(case: str, finished: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, module, None)  # as though it were not installed
    arguments, wanted = MISTAKES[case]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = [argument.replace("FOLDER", str(finished)) for argument in arguments]
    assert main(["serve", *given, *([] if case == "port" else [f"--ray.port={port}"])]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("coin: error: ")
    assert wanted in line


def test_a_port_that_is_taken_is_refused_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as Ray's proxies do
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", ".", f"--ray.port={port}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"coin: error: found 127.0.0.1:{port} in use (")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="it finds the servers' processes in /proc")
def test_on_ray_clients_get_answers_while_experts_are_killed_and_a_4xx_for_what_is_wrong(
    alone: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray Serve is not installed: pip install '.[serve]'")
    root = Path(__file__).parents[2]
    benchmark = [str(root / "notebooks/benchmarks/failover.py"), str(alone), f"--output={tmp_path}", "--repeats=1"]
    phases = ["--setups", "standin-packed", "--events", "1", "--loads", "--warmup=2", "--before=3", "--after=4"]
    command = [sys.executable, *benchmark, *phases, "--images=24", "--clients=20"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "all as it should be" in found.stdout
    accuracy = pd.read_csv(tmp_path / "accuracy.csv")
    assert (accuracy["lost"].tolist(), accuracy["failed"].tolist()) == ([0, 1, 2], [0, 0, 0])
