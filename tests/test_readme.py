"""The README's Python is run, its commands and files exist, and it stays short."""

import re
from pathlib import Path

import pytest
import torch

import coin
from coin.reporting.extras import PROMISE_COLUMNS, RISK_COLUMNS
from coin.reporting.results import COLUMNS, KEYS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_python_runs_and_the_oracle_of_a_linear_network_is_exact(monkeypatch, tmp_path) -> None:
    torch.manual_seed(0)
    # What the README leaves to the reader: two trained networks and their data.
    experts = [torch.nn.Sequential(torch.nn.Linear(6, 3)) for _ in range(2)]
    calibration = [[torch.randn(5, 6), torch.randn(2, 6)] for _ in experts]
    test_loaders = [[(torch.randn(9, 6), torch.randint(3, (9,))) for _ in range(2)] for _ in experts]
    inputs = torch.randn(9, 6)
    names = {"experts": experts, "calibration": calibration, "test_loaders": test_loaders, "inputs": inputs}
    monkeypatch.chdir(tmp_path)  # it writes a file
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), names)
    assert (names["table"].query("decoder == 'linear'").nda == 1).all()  # type: ignore[attr-defined]
    torch.testing.assert_close(names["decoded"][0], experts[0](inputs), rtol=1e-2, atol=1e-2)
    again = coin.Coded.load("system.safetensors", experts)
    assert torch.equal(again.decode(inputs, [0]), names["decoded"])  # type: ignore[attr-defined]


def test_every_public_name_is_there() -> None:
    for name in coin.__all__:
        assert getattr(coin, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        coin.nothing  # noqa: B018


def test_files_it_names_exist() -> None:
    manual = (ROOT / "notebooks/MANUAL.md").read_text(encoding="utf-8")
    for path in re.findall(r"configs/[\w/.-]+\.yaml|notebooks/[\w.-]+\.(?:ipynb|md)", TEXT + manual):
        assert (ROOT / path).is_file(), path


def test_the_benchmarks_page_tells_of_every_column_and_names_files_that_exist() -> None:
    text = (ROOT / "notebooks/BENCHMARK.md").read_text(encoding="utf-8")
    parts = {part.split("`")[1]: part for part in re.split(r"\n## (?=`\w+\.csv`)", text)[1:]}
    told = {name: re.findall(r"^\| `(\w+)` \|", part, flags=re.MULTILINE) for name, part in parts.items()}
    assert told["results.csv"] == list(COLUMNS)
    assert told["risk.csv"] == list(RISK_COLUMNS[len(KEYS) :])
    assert told["promise.csv"] == list(PROMISE_COLUMNS[len(KEYS) :])
    paths = re.findall(r"(?:configs|notebooks)/[\w/.-]+\.\w+", text)
    assert paths
    for path in paths:
        assert (ROOT / path).is_file(), path


def test_make_targets_it_names_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in re.findall(r"make ([a-z-]+)", TEXT):
        assert target in targets, target


def test_it_stays_short() -> None:
    assert len(TEXT.splitlines()) < 150


def test_top_level_is_what_the_owner_named() -> None:
    allowed = {"pyproject.toml", "coin", "configs", "tests", "notebooks", "Makefile", "README.md", "LICENSE"}
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert visible - {"runs", "data", "dist", "wandb", "lightning_logs"} == allowed
