"""Shipped YAML files are found by name: in the repository, and in a wheel that is installed elsewhere."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from coin.commands.arguments import CONFIGS, apply_common_options, shipped

ROOT = Path(__file__).parents[2]

NAMES = {
    "quickstart": "experiment/quickstart.yaml",
    "mnist-svhn": "experiment/paper/mnist-svhn.yaml",
    "mnist": "expert/mnist.yaml",
    "configs/experiment/study/fleet-8.yaml": "experiment/study/fleet-8.yaml",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_shipped_file(name):
    assert shipped(name) == str(CONFIGS / NAMES[name])


def test_a_file_of_that_name_comes_first():
    Path("quickstart").touch()
    assert shipped("quickstart") == "quickstart"


def test_no_two_files_have_one_name():
    names = [path.stem for path in CONFIGS.rglob("*.yaml")]
    assert len(names) == len(set(names))


FILE = f"--config={CONFIGS / NAMES['mnist']}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["x", "-c", "mnist", "--name=y", "--config=mnist"], [FILE, FILE, "x", "--name=y"]),
        (["tasks", "--tasks={}"], ["tasks", "--tasks={}", "--tasks={}"]),
        (["--methods", "[]"], ["--methods=[]", "--methods", "[]"]),
        (["--tasks.a=b"], ["--tasks.a=b"]),
    ],
)
def test_files_come_first_and_what_replaces_all_entries_after_an_empty_value(given, expected):
    assert apply_common_options(given) == expected


@pytest.mark.slow
def test_a_wheel_has_every_configuration_and_finds_them_in_an_empty_folder(tmp_path):
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "--target=wheel", "--directory", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True)  # without pip, which environments of uv lack
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    files = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    configs = {f"coin/{path.relative_to(ROOT)}" for path in files}
    assert configs <= names
    assert {"coin/py.typed", "coin/reporting/report.html.jinja"} <= names
    assert len({name.split("/")[0] for name in names}) == 2  # coin and its metadata
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-m", "coin", "run", "-c", "fleet-2", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        command, cwd=empty, env=environment, capture_output=True, text=True, check=True
    )
    assert "seed 401: evaluation" in done.stdout
