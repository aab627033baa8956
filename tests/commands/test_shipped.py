"""Shipped YAML files are found by name: in the repository, and in a wheel that is installed elsewhere."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from coin.cli import main
from coin.commands.arguments import CONFIGS, apply_common_options, shipped

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("quickstart", "experiment/quickstart.yaml"),
        ("mnist-svhn", "experiment/paper/mnist-svhn.yaml"),
        ("mnist", "expert/mnist.yaml"),
        ("configs/experiment/study/fleet-8.yaml", "experiment/study/fleet-8.yaml"),
    ],
)
def test_a_name_is_a_shipped_file(name, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = apply_common_options(["x", "-c", name, "--name=y", f"--config={name}"])
    assert [each for each in given if "s=" not in each] == [f"--config={CONFIGS / file}"] * 2 + ["x", "--name=y"]


def test_options_that_replace_all_entries_follow_an_empty_value_and_a_folder_of_their_name_does_not():
    assert apply_common_options(["tasks", "--tasks={}"]) == ["tasks", "--tasks={}", "--tasks={}"]
    assert apply_common_options(["--methods", "[]", "--tasks.a=b"]) == [
        "--methods=[]",
        "--methods",
        "[]",
        "--tasks.a=b",
    ]


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").touch()
    assert shipped("quickstart") == "quickstart"


def test_an_unknown_name_ends_in_a_line_with_what_was_meant_and_the_folder(capsys):
    for name, message in (("quikstart", " (did you mean quickstart?)"), ("zzz", "")):
        assert main(["run", "-c", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        expected = f"expected a file, or the name of one in {CONFIGS};"
        assert f"found no configuration '{name}'{message}, {expected}" in line


def test_no_two_files_have_one_name():
    names = [path.stem for path in CONFIGS.rglob("*.yaml")]
    assert len(names) == len(set(names))


def test_a_wheel_has_every_configuration_and_finds_them_in_an_empty_folder(tmp_path):
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True)  # without pip, which environments of uv lack
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {f"coin/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*") if path.is_file()} <= names
    assert {"coin/py.typed", "coin/reporting/report.html.jinja"} <= names
    assert {name.split("/")[0] for name in names} == {"coin", f"{wheel.stem.removesuffix('-py3-none-any')}.dist-info"}
    (tmp_path / "empty").mkdir()
    command, environment = (
        ["coin", "run", "-c", "fleet-2", "--dry-run"],
        os.environ | {"PYTHONPATH": f"{tmp_path}/installed"},
    )
    where = {"cwd": tmp_path / "empty", "env": environment}
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=True, **where)
    assert "seed 401: evaluation" in done.stdout
