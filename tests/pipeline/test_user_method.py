"""``coin run`` with methods of the user's own, and again after their source has changed."""

import sys
from pathlib import Path

import pytest

from coin.cli import main
from coin.files.safetensors import load_provenance
from coin.reporting import read_results

pytestmark = pytest.mark.slow

CONFIG = """
name: foreign
network: {name: small_resnet, image_size: 16, options: {width: 4}}
tasks:
  digits: {class_path: Digits, init_args: {max_train: 120, max_test: 77}}
  letters: {class_path: Glyphs, init_args: {classes: A-F, train_per_class: 30, test_per_class: 9}}
expert: {epochs: 2, lr: 0.05, batch_size: 32}
calibration: {samples_per_task: 12, batch_size: 8}
methods:
  - {class_path: Average, init_args: {batchnorm: average}}
  - {class_path: UserMethod, init_args: {function: mine.merge}}
  - {class_path: UserMethod, init_args: {function: mine.merge, options: {share: 0.9}, label: tilted}}
  - {class_path: UserMethod, init_args: {function: notebooks.foreign_methods.dare}}
  - {class_path: UserMethod, init_args: {function: notebooks.foreign_methods.distil, options: {steps: 5}}}
  - {class_path: UserMethod, init_args: {function: notebooks.foreign_methods.tsv_m}}
decoders: [linear, ridge]
seeds: [1]
"""
MINE = """
def merge(experts, calibration, share=0.5):
    first, second = experts
    state = second.state_dict()
    for name, tensor in first.state_dict().items():
        if tensor.is_floating_point():
            tensor.mul_(share).add_((1 - share) * state[name])
    return first
"""


@pytest.fixture(autouse=True)
def workplace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the examples, and forget this test's folder after it: another's has a module of the same name."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    monkeypatch.delitem(sys.modules, "mine", raising=False)


def run(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    sys.modules.pop("mine", None)
    assert main(["run", "-c", "foreign.yaml", "--output=.", *options]) == 0
    return capsys.readouterr().err


@pytest.mark.usefixtures("no_reports")
def test_it_enters_the_table_by_one_line_and_is_made_anew_when_its_source_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign.yaml").write_text(CONFIG)
    (tmp_path / "mine.py").write_text(MINE)  # in the working folder
    run(capsys)
    folder = tmp_path / "foreign/seed-1"
    frame = read_results(folder)
    assert set(frame.method) == {"none", "oracle", "average", "merge", "tilted", "dare", "distil", "tsv_m"}
    rows = frame[frame.decoder == "linear"].set_index(["method", "task"])
    assert (rows.loc["merge"].nda == rows.loc["average"].nda).all()
    assert (rows.loc["tilted"].residual != rows.loc["merge"].residual).all()
    assert (rows.loc["dare"].merge_seconds > 0).all()
    assert (rows.loc["merge"].merge_passes == 0).all()
    assert (rows.loc["distil"].merge_passes == 2 * 24 + 5 * 64 * 3).all()
    assert (rows.loc["merge"].batchnorm == "").all()
    assert load_provenance(folder / "coded/tilted.safetensors")["method"]["options"]["options"] == {"share": 0.9}
    (tmp_path / "mine.py").write_text(MINE + "# changed\n")
    said = run(capsys)
    assert "seed 1: merge: merging" in said
    assert "dare: up to date" in said


def test_what_it_raises_keeps_its_traceback_and_one_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign.yaml").write_text(CONFIG)
    (tmp_path / "mine.py").write_text("def merge(experts, calibration, share=1):\n    return share / 0\n")
    methods = "--methods=[{class_path: UserMethod, init_args: {function: mine.merge}}]"
    assert main(["run", "-c", "foreign.yaml", "--output=.", methods.replace("mine.merge", "mine.merged")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("coin: error: found function 'mine.merged', expected the import path of a Python function")
    with pytest.raises(ZeroDivisionError):
        main(["run", "-c", "foreign.yaml", "--output=.", methods])
