"""Kill ``coin run`` or ``coin sweep`` at random moments, start it again, and compare with an undisturbed run.

    python tests/benchmarks/kills.py configs/experiment/smallest.yaml --kills 30 --seed 0 --folder /tmp/kills

A file with a ``grid`` is a sweep. Every round starts in an empty folder; the command is killed (``kill -9``, the
whole process group) after a random time, started again in the same folder, killed again, …, until it comes to its end
before it is killed. Then everything is compared: the rows of all ``results.csv`` but for their seconds, and every
number of all experts, statistics and coded models. Rounds follow until there were enough kills. The time to a kill is
drawn evenly from 0 to the time of the undisturbed run. The exit status is 1 where anything differs or a restart fails.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from safetensors import safe_open

from coin.reporting import read_results

TIMES = ("merge_seconds", "decoder_seconds")


def command_of(file: Path, output: Path) -> list[str]:
    """Return the arguments of ``coin`` that run an experiment's or a sweep's file."""
    if "grid" in yaml.safe_load(file.read_text()):
        return ["sweep", str(file), f"--output={output}", "--jobs=1"]
    return ["run", "-c", str(file), f"--output={output}"]


def run(arguments: list[str], log: Path, seconds: float | None) -> tuple[int | None, float]:
    """Run a command, and kill its process group after so many seconds; return its status (none if killed) and time."""
    started = time.monotonic()
    with log.open("ab") as file:
        command = [sys.executable, "-m", "coin", *arguments]
        process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait(seconds), time.monotonic() - started
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None, time.monotonic() - started


def measured(output: Path) -> dict[str, str]:
    """Return what must not change, by file: rows without seconds, and tensors, as text."""
    found = {}
    for path in sorted(output.rglob("results.csv")):
        rows = read_results(path.parent).drop(columns=list(TIMES))
        found[str(path.relative_to(output))] = rows.to_csv(index=False)
    for path in sorted(output.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        found[str(path.relative_to(output))] = json.dumps(
            {name: [str(value.dtype), value.flatten().tolist()] for name, value in sorted(tensors.items())}
        )
    return found


def main() -> int:
    """Run the comparison, and report it as text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/coin-kills"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    draw = random.Random(options.seed)

    undisturbed, log = options.folder / "undisturbed", options.folder / "undisturbed.log"
    status, longest = run(command_of(options.file, undisturbed), log, None)
    if status != 0:
        print(f"the undisturbed run ended with status {status}; see {log}")
        return 1
    wanted = measured(undisturbed)
    print(f"{len(wanted)} files to compare, up to {longest:.0f} s to a kill", flush=True)

    kills = rounds = different = 0
    moments: list[str] = []
    while kills < options.kills:
        output, log = options.folder / f"round-{rounds}", options.folder / f"round-{rounds}.log"
        own = 0
        status = None
        while status is None:
            seconds = draw.uniform(0, longest) if kills < options.kills else None
            status, took = run(command_of(options.file, output), log, seconds)
            if status is None:
                kills, own = kills + 1, own + 1
                last = ["nothing said yet", *log.read_text(errors="replace").strip().splitlines()][-1]
                moments.append(f"{took:.0f}")
                print(f"  round {rounds}: killed after {took:.1f} s ({last[:90]})", flush=True)
        if status != 0:
            print(f"round {rounds}: FAILED with status {status} after {own} kills; see {log}", flush=True)
            return 1
        found = measured(output)
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        different += bool(wrong)
        verdict = f"DIFFERS in {', '.join(wrong)}" if wrong else "the same"
        left = len(list(output.rglob(".*.tmp")))
        print(f"round {rounds}: {own} kills, then finished: {verdict}; {left} temporary files left", flush=True)
        shutil.rmtree(output)
        rounds += 1
    print(f"{kills} kills, after {', '.join(moments)} s")
    print(f"{rounds} rounds: {rounds - different} the same as undisturbed, {different} not")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
