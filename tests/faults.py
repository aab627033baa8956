"""Make the faults of `faults.yaml` one at a time, run the quick tests of their room, and print those that none caught.

    python tests/faults.py [ROOM …]

A fault is a file, one line of it and the same line wrong; it stands under the folder of tests that must catch it. The
faults are made in a copy of the working tree. The exit status is 1 where a fault survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
COPIED = ("coin", "configs", "notebooks", "tests", "pyproject.toml", "Makefile", "README.md")
PYTEST = (sys.executable, "-m", "pytest", "-x", "-m", "not slow")
FAILED = (1, 2)  # pytest's exit statuses: a test failed; a file of tests could not be imported


def caught(copy: Path, room: str) -> bool:
    """Return whether the room's quick tests fail on the copy; prints how they ended if that says neither."""
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    command = [*PYTEST, f"tests/{room}"]
    ended = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    if ended.returncode not in (0, *FAILED):
        sys.exit(
            f"pytest ended with status {ended.returncode} on tests/{room}:\n{ended.stdout}{ended.stderr}"
        )
    return ended.returncode in FAILED


def survives(copy: Path, room: str, fault: dict[str, str]) -> bool:
    """Make a fault in the copy, and return whether the room's tests pass in spite of it."""
    path = copy / fault["file"]
    right = path.read_text()
    if right.splitlines().count(fault["line"]) != 1:
        sys.exit(f"found the line {fault['line']!r} not once in {fault['file']}")
    lines = [fault["wrong"] if line == fault["line"] else line for line in right.splitlines()]
    path.write_text("\n".join(lines) + "\n")
    survived = not caught(copy, room)
    path.write_text(right)
    return survived


def main(rooms: list[str]) -> int:
    faults = yaml.safe_load((ROOT / "tests/faults.yaml").read_text())
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "coin"
        for name in COPIED:
            take = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy.mkdir(exist_ok=True)
            take(ROOT / name, copy / name)
        for room in rooms or faults:
            if caught(copy, room):
                sys.exit(f"the tests of tests/{room} fail without a fault")
            for fault in faults[room]:
                survived = survives(copy, room, fault)
                survivors += survived
                verdict = "SURVIVES" if survived else "caught"
                print(f"{verdict} {room}: {fault['file']}: {fault['wrong'].strip()}", flush=True)
    print(f"{survivors} of the faults survive")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
