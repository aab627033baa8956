"""Shipped YAML files are found by name: in the repository, and in a wheel that is installed elsewhere."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from coin.cli import main
from coin.commands.arguments import complete
from coin.commands.shipped import CONFIGS, shipped
from coin.errors import FileError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "name", "file"),
    [
        ("run", "quickstart", "experiment/quickstart.yaml"),
        ("run", "mnist-svhn", "experiment/paper/mnist-svhn.yaml"),
        ("run", "experts", "cluster/experts.yaml"),
        ("fit", "mnist", "expert/mnist.yaml"),
        ("test", "csv", "logger/csv.yaml"),
        ("run", "fleet-8", "experiment/study/fleet-8.yaml"),
        ("run", "configs/experiment/study/fleet-8.yaml", "experiment/study/fleet-8.yaml"),
    ],
)
def test_a_name_is_a_shipped_file_of_the_command(command, name, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped(command, name) == str(CONFIGS / file)
    given = complete(command, ["x", "-c", name, f"--config={name}"])
    assert [each for each in given if "s=" not in each] == [f"--config={CONFIGS / file}"] * 2 + ["x"]


def test_files_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").touch()
    for given in ("quickstart", "missing.yaml", "a/quickstart"):
        assert shipped("run", given) == given


def test_an_unknown_name_ends_in_a_line_with_the_names_there_are(capsys):
    for name, message in (("quikstart", "(did you mean quickstart?)"), ("zzz", "; there are ")):
        assert main(["run", "-c", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"found no configuration '{name}', expected a file" in line
        assert message in line
    assert all(f" {path.stem}," in line for path in (ROOT / "configs/experiment/study").glob("*.yaml"))
    with pytest.raises(FileError, match="found no configuration 'pairs'"):
        shipped("merge", "pairs")


def test_no_two_files_of_a_command_have_one_name():
    for folders in (("experiment", "cluster"), ("expert", "logger", "cluster")):
        names = [path.stem for folder in folders for path in (CONFIGS / folder).rglob("*.yaml")]
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
