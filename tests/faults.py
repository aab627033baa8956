"""Make the faults of `faults.yaml` one at a time, run the quick tests of their room, and print those that none caught.

    python tests/faults.py [ROOM …]

A fault is a file, one line of it and the same line wrong; it stands under the folder of tests that must catch it. The
faults are made in a copy of the working tree. The exit status is 1 where a fault survives.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
COPIED = ("coin", "configs", "notebooks", "tests", "pyproject.toml", "Makefile", "README.md")
PYTEST = (sys.executable, "-m", "pytest", "-x", "-m", "not slow")


def caught(copy, room):
    """Return whether the room's quick tests fail on the copy."""
    command = [*PYTEST, f"tests/{room}"]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    ended = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    status = ended.returncode
    if status not in (0, 1, 2):  # a test failed; a file of tests could not be imported
        output = ended.stdout + ended.stderr
        sys.exit(f"pytest ended with status {status} on tests/{room}:\n{output}")
    return status != 0


def survives(copy, room, fault):
    """Make a fault in the copy, and return whether the room's tests pass in spite of it."""
    path = copy / fault["file"]
    right = path.read_text()
    lines = right.splitlines()
    if lines.count(fault["line"]) != 1:
        sys.exit(f"found the line {fault['line']!r} not once in {fault['file']}")
    lines[lines.index(fault["line"])] = fault["wrong"]
    path.write_text("\n".join(lines) + "\n")
    survived = not caught(copy, room)
    path.write_text(right)
    return survived


def main(rooms):
    faults = yaml.safe_load((ROOT / "tests/faults.yaml").read_text())
    survivors = 0
    with tempfile.TemporaryDirectory() as copy:
        subprocess.run(["cp", "-r", *COPIED, copy], cwd=ROOT, check=True)
        for room in rooms or faults:
            if caught(Path(copy), room):
                sys.exit(f"the tests of tests/{room} fail without a fault")
            for fault in faults[room]:
                survived = survives(Path(copy), room, fault)
                survivors += survived
                verdict = "SURVIVES" if survived else "caught"
                print(f"{verdict} {room}: {fault['file']}: {fault['wrong'].strip()}", flush=True)
    print(f"{survivors} of the faults survive")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
