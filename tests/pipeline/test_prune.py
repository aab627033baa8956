"""What nothing refers to in the store of steps: what it is, that it is told of, and that only it is removed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coin.cli import main
from coin.errors import CoinError
from coin.pipeline.plan import Planned
from coin.pipeline.prune import remove, unreferenced
from coin.pipeline.run import execute
from tests.pipeline.test_step import Write, write


def planned(step: Write, folder: Path, **links: str) -> Planned:
    experiment: Any = SimpleNamespace(name="x")
    shown = {folder / name: step.folder / file for name, file in links.items()}
    return Planned(step, step.name, experiment, shown)


def made(folder: Path, name: str, **options: Any) -> Write:
    step = write(folder, name, **options)
    execute(step)
    return step


def test_what_an_experiment_links_to_or_was_made_from_is_kept(tmp_path: Path) -> None:
    own = made(tmp_path, "own")
    source = made(tmp_path, "source")
    linked = made(tmp_path, "linked", parts=(source,))
    unused = [made(tmp_path, "own", option=2), made(tmp_path, "unused")]
    write(tmp_path, "unfinished").folder.mkdir()
    (unused[0].folder / "link").symlink_to(".")  # as W&B has within its folders
    assert len(unreferenced([planned(own, tmp_path)])) == 4
    planned(linked, tmp_path / "other/seed-0/experts", digits="").publish()
    assert unreferenced([planned(own, tmp_path)]) == sorted(step.folder for step in unused)


def test_nothing_is_removed_while_a_run_is_at_work_and_only_what_is_unused_then(tmp_path: Path) -> None:
    own, unused = made(tmp_path, "own"), made(tmp_path, "unused")
    busy = write(tmp_path, "busy")
    with busy.locked(), pytest.raises(CoinError, match=r"found a run at work on 'busy-.*wait until it has ended"):
        remove([unused.folder], own.store)
    assert unused.is_done
    remove([unused.folder], own.store)
    assert own.is_done
    assert not unused.folder.exists()
    remove([], tmp_path / "no store yet")


@pytest.mark.slow
def test_a_dry_run_tells_what_nothing_refers_to_and_prune_removes_it(
    copied: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = copied.parent / ".steps"
    (expert,) = store.glob("expert-digits-*")
    unused = store / "expert-digits-000000000000"
    shutil.copytree(expert, unused)
    before = sorted(store.glob("*-*"))
    command = ["run", "-c", str(config), f"--output={copied.parent}"]
    assert main([*command, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert f"nothing refers to 1 finished steps in '{store}', " in told
    assert unused.name in told
    assert main([*command, "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["unreferenced"]
    assert document["folders"] == [str(unused)]
    assert document["mib"] > 0.1
    # With another rate the plan's experts are others: those of now are kept, their experiment shows them.
    assert main([*command, "--expert.lr=0.3", "--prune"]) == 0
    assert f"removed {unused.name}\n1 steps, " in capsys.readouterr().out
    assert sorted(store.glob("*-*")) == [folder for folder in before if folder != unused]
    assert main([*command, "--prune"]) == 0
    assert capsys.readouterr().out == f"0 steps, 0.0 MiB, removed from '{store}'\n"
