"""``coin serve``: the system it makes of an experiment, its mistakes, and on Ray Serve, where that is installed."""

import asyncio
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

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
from tests.serving.conftest import ask_all, ask_one

EXPERTS = ["expert-digits", "expert-letters"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (8, 3, 16, 16), generator=generator, dtype=torch.uint8)


def read(folder, method=None, decoder=None, policy=None):
    return read_system(str(folder), method, decoder, policy and PolicyKind(policy), 0.8)


def front_end(system, *lost):
    """Return a front end with the networks in this process, some of which are lost."""
    network_of = system.reader()

    def serve(name):
        async def ask(expert, images):
            if name in lost:
                raise RuntimeError("killed")
            return network_of(system.files[name][expert])(images, expert)

        return ask

    servers = {name: serve(name) for name in system.files}
    return FrontEnd(system, servers, Limits(timeout=60.0, deadline=60.0))


def answer(system, images, expert, *lost):
    return asyncio.run(ask_one(front_end(system, *lost), images, expert))


def answers_of(network, images):
    with torch.no_grad():
        return network(to_input(images, 16))


def accuracies(system, *lost):
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
def test_what_is_served_is_as_accurate_as_the_results_say(request, run, method, decoder, policy):
    folder = request.getfixturevalue(run)
    system = read(folder, method, decoder)
    assert system.stand_ins.policy == policy  # the default for the decoder
    assert list(system.files) == [*EXPERTS, "coded-0"]
    results = read_results(folder / "seed-0").sort_values("task")
    results = results[(results.method == method) & (results.decoder == decoder)]
    best = results.groupby("batchnorm").decoded_accuracy.mean().idxmax()
    rows = results[results.batchnorm == best]
    own = rows.expert_accuracy.tolist()
    decoded = rows.decoded_accuracy.tolist()
    assert accuracies(system) == pytest.approx(own)
    assert accuracies(system, EXPERTS[0]) == pytest.approx([decoded[0], own[1]])
    if policy == "standin":
        assert accuracies(system, *EXPERTS) == pytest.approx(decoded)


def test_what_is_served_by_default_is_what_is_recommended_of_what_the_policy_can_use(alone):
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["coin", "magic"], "with decoder 'magic'"),
        (["coin", "linear", "standin"], "a decoder that reads none, such as expert_head"),
        (["coin", "expert_head", "coded_hedged"], "a decoder that reads the survivors, such as"),
        (["replica-3bit"], "digits.3bit.safetensors"),
        (["replica-3bit", "ridge"], "expected policy replica"),
        (["replica-3bit", None, "standin"], "expected policy replica"),
    ],
)
def test_what_the_run_or_the_policy_has_not_is_refused(options, message, alone):
    with pytest.raises((ConfigurationError, FileError), match=message):
        read(alone, *options)


def test_without_ray_is_one_line(alone, capsys, monkeypatch):
    for module in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, module, None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert main(["serve", str(alone), f"--ray.port={port}"]) == 2
    assert "pip install '.[serve]'" in capsys.readouterr().err.splitlines()[-1]


def test_a_port_that_is_taken_is_refused_before_anything_is_read(capsys):
    # Others may listen on it too, as on those of Ray's proxies.
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", ".", f"--ray.port={port}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"coin: error: found 127.0.0.1:{port} in use (")


def test_where_experts_are_too_weak_to_recommend_anything_a_warning_says_what_is_served(
    alone, tmp_path
):
    folder = shutil.copytree(alone, tmp_path / "run")
    path = folder / "seed-0/results.csv"
    results = pd.read_csv(path)
    results["expert_accuracy"] = results["chance"]
    results.to_csv(path, index=False)
    with pytest.warns(CoinWarning, match="nothing can be recommended: the expert of") as found:
        system = read(folder)
    (warning,) = found
    assert f"; serving {system.variant} all the same" in str(warning.message)


def test_one_expert_of_a_body_with_adapters_is_exported(alone, tmp_path, images):
    body = alone / "seed-0/coded/refit+rank2.safetensors"
    made = load_network(export(body, tmp_path / "letters", expert="letters"))
    served = answer(read(alone, "refit+rank2", "expert_head"), images, 1, *EXPERTS)
    found = answers_of(made.network, images)
    torch.testing.assert_close(found, served.logits[:, :6].float(), rtol=1e-2, atol=1e-2)


OF_TASKS = "expected one of digits, letters; give --expert"


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("refit+rank2", {"peft": True}, "found a scale or bias of .*, expected plain LoRA"),
        ("refit+rank2", {}, OF_TASKS),
        ("refit+rank2", {"expert": "cats"}, OF_TASKS),
        ("coin", {"expert": "letters"}, "found no adapters in"),
    ],
)
def test_what_cannot_be_exported_is_refused(file, options, message, alone, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        export(alone / f"seed-0/coded/{file}.safetensors", tmp_path / "out", **options)


def test_what_a_promise_covers_is_told(alone, images):
    system = read(alone, "coin", "expert_head")
    (decoder,) = system.decoders.values()
    decoder.promises = {0: Promise(0.5, 0.02, 0.95, 1.0, 9, 9)}
    first, second = asyncio.run(ask_all(front_end(system, *EXPERTS), images))
    scores = 1 - first.logits[:, :10].double().softmax(1).amax(1)
    assert torch.equal(first.accepted, scores <= 0.5)
    assert not second.accepted.any()


def test_a_replica_holds_every_expert_and_answers_like_them(finished, images):
    system = read(finished, "coin", "feature_ridge", "replica")
    assert list(system.files) == [*EXPERTS, "replica-0"]
    assert list(read(finished, "coin", "feature_ridge", "uncoded").files) == EXPERTS
    replica = answer(system, images, 0, EXPERTS[0])
    assert not replica.decoded
    assert replica.answered_by == ("replica-0",)
    torch.testing.assert_close(replica.logits, answer(system, images, 0).logits)


def test_compressed_copies_answer_as_their_networks(finished, tmp_path, images):
    seed = shutil.copytree(finished, tmp_path / "tiny") / "seed-0"
    copies = {}
    for task in ("digits", "letters"):
        copies[task] = seed / f"replicas/{task}.4bit.safetensors"
        compress_file(
            seed / f"experts/{task}/expert.safetensors", copies[task], None, Compression(4, 0)
        )
    system = read(tmp_path / "tiny", "replica-4bit")
    assert system.stand_ins.policy == "replica"
    assert system.variant == "replica-4bit"
    for expert, path in enumerate(copies.values()):
        file = load_network(path)
        given = answer(system, images, expert, *EXPERTS)
        assert given.answered_by == ("replica-0",)
        expected = answers_of(file.network, images)
        torch.testing.assert_close(given.logits[:, : file.num_classes], expected)


OPTIONS = (
    "--repeats=1 --setups standin-packed --events 1 --loads"
    " --warmup=2 --before=3 --after=4 --images=24 --clients=20"
)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists(), reason="it finds the servers' processes in /proc"
)
def test_on_ray_clients_get_answers_while_experts_are_killed(alone, tmp_path):
    pytest.importorskip("ray", reason="Ray Serve is not installed: pip install '.[serve]'")
    script = ROOT / "notebooks/benchmarks/failover.py"
    command = [sys.executable, script, alone, f"--output={tmp_path}", *shlex.split(OPTIONS)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "all as it should be" in found.stdout
    accuracy = pd.read_csv(tmp_path / "accuracy.csv")
    assert accuracy["lost"].tolist() == [0, 1, 2]
    assert accuracy["failed"].tolist() == [0, 0, 0]
