"""Which stand-in is chosen: the cheapest that meets all limits on the worst task, or what comes nearest."""

import random
import subprocess
import sys
from html import unescape

import pandas as pd
import pytest

from coin.cli import main
from coin.commands.serve import recommended_copies
from coin.errors import ConfigurationError, FileError
from coin.reporting import choose, write_report
from coin.reporting.choice import recommended, shortlist, undominated
from coin.reporting.results import write_results
from coin.reporting.standins import standins
from coin.reporting.summary import read_run
from coin.reporting.tables import print_standins
from tests.reporting.conftest import frame, row

# method, decoder, NDA on a and on b, memory, resident memory, forwards, losses
KEPT = (
    ("none", "ridge", 0.80, 0.60, 0.1, 0.1, 1, 1),
    ("small", "expert_head", 1.10, 0.985, 5.0, 6.0, 1, 2),
    ("small", "ridge", 0.99, 0.99, 5.0, 7.0, 2, 1),
    ("uneven", "expert_head", 1.00, 0.97, 2.0, 12.0, 1, 2),
    ("large", "expert_head", 0.999, 0.999, 30.0, 30.0, 1, 2),
    ("replica", "replica", 1.05, 1.02, 20.0, 24.0, 1, 2),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    columns = ("method", "decoder", "memory_mib", "resident_mib", "forwards", "losses")
    for seed in (0, 1):
        rows = []
        for method, decoder, on_a, on_b, *costs in KEPT:
            own = dict(zip(columns, (method, decoder, *costs), strict=True))
            rows += [row(on_a, "a", seed=seed, **own), row(on_b, "b", seed=seed, **own)]
        write_results(folder / f"seed-{seed}", rows, {})
    return folder


@pytest.mark.parametrize(
    ("wishes", "count", "first"),
    [
        # Of equal memory the fewer networks win.
        ({"accuracy": 0.98}, 4, "small with expert_head"),
        # Its mean is 98.5 %, the worst task 97.
        ({"accuracy": 0.97}, 5, "uneven with expert_head"),
        ({"accuracy": 0.99}, 3, "small with ridge"),
        ({"accuracy": 0.99, "forwards": 1}, 2, "replica"),
        ({"accuracy": 0.99, "losses": "all"}, 2, "replica"),
        ({"accuracy": 0.5}, 6, "the survivors alone with ridge"),
        ({"accuracy": 0.99, "losses": 2, "memory_mib": 20}, 1, "replica"),
        ({"accuracy": 1}, 1, "replica"),  # NDA counts to 100 %
        ({"accuracy": 0.97, "resident_mib": 10}, 2, "small with expert_head"),
        ({"accuracy": 0.99, "losses": 2, "resident_mib": 24}, 1, "replica"),
    ],
)
def test_the_cheapest_that_meets_all_limits_is_first(wishes, count, first, folder):
    rows, sentence = choose(folder, **wishes)
    assert len(rows) == count
    assert sentence.startswith(f"Keep {first} (")


SMALL = {"accuracy": 0.99, "memory_mib": 10, "forwards": 1}


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        (
            {"accuracy": 1, "resident_mib": 23},
            "Nothing keeps 100 % on the worst task and holds at most 23 MiB resident;",
        ),
        (SMALL, "accurate enough is small with ridge (99.00 %"),
        (SMALL, "within the limits is small with expert_head (98.50 %"),
        ({"accuracy": 1, "losses": 3}, "accurate enough is replica (100.00 %"),
    ],
)
def test_where_nothing_meets_the_limits_the_nearest_are_told(wishes, told, folder):
    rows, sentence = choose(folder, **wishes)
    assert rows.empty
    assert told in sentence


def said_of(folder, capsys):
    """Return the sentence that the page, the terminal and `choose` say of what is recommended."""
    sentence = choose(folder)[1]
    page = unescape(write_report(folder).read_text(encoding="utf-8"))
    assert " ".join(page.split()).count(sentence) == 1
    print_standins(read_run(folder)[1])
    assert capsys.readouterr().out.endswith(f"{sentence}\n")
    return sentence


def test_all_that_names_a_stand_in_names_the_recommended_one(folder, capsys):
    assert said_of(folder, capsys).startswith("Keep small with expert_head (98.50 %")
    assert recommended_copies(folder) is None
    kept = standins(read_run(folder)[1])
    assert recommended(kept).tolist()[:2] == ["small", "expert_head"]
    inaccurate = kept[kept.nda_worst < 0.98]
    assert recommended(inaccurate).method == "uneven"  # the most accurate on the worst task


@pytest.mark.parametrize("fewer_mib", [20 / 2**20, 1e-3])
def test_of_what_is_printed_alike_the_more_accurate_is_recommended(fewer_mib, written, capsys):
    base = row(0.990, method="base", memory_mib=2.55 - fewer_mib)
    refit = row(0.992, method="refit", memory_mib=2.55)
    sentence = said_of(written([base, refit]), capsys)
    assert sentence.startswith("Keep refit with linear (99.20 %")


@pytest.mark.parametrize("seed", range(40))
def test_what_is_recommended_has_a_star(seed):
    draw = random.Random(seed).choice
    rows = []
    for method in "abcdefgh":
        costs = {"memory_mib": draw([1, 2]), "resident_mib": draw([3, 4]), "forwards": draw([1, 2])}
        own = {"method": method, "losses": draw([1, 2]), **costs}
        rows += [row(draw([0.97, 0.98, 1]), task, **own) for task in "xy"]
    kept = standins(frame(rows))
    assert undominated(kept)[recommended(kept).name]


def test_what_is_recommended_is_on_the_short_list_though_others_are_better_on_average():
    columns = {
        "method": ["none", "none", "coin", "coin"],
        "decoder": ["ridge", "linear", "linear", "ridge"],
        "nda_mean": [0.85, 0.80, 0.84, 0.86],
        "nda_worst": [0.5, 0.5, 0.68, 0.6],
    }
    assert shortlist(pd.DataFrame(columns)).tolist() == [True, False, True, True]


GUESSES = row(1.0, "b", expert_accuracy=0.12, chance=0.1)
TOO_WEAK = {
    "what stands in is right more often than the lost experts": [row(3.0, "a"), row(3.0, "b")],
    "the expert of 'b' is hardly more often right than chance": [row(1.0, chance=0.5), GUESSES],
    "no stand-in has a known NDA and memory": [row(1.0, method="oracle", memory_mib=float("nan"))],
}


@pytest.mark.parametrize("reason", TOO_WEAK)
def test_nothing_is_recommended(reason, written, capsys):
    folder = written(TOO_WEAK[reason])
    assert said_of(folder, capsys).startswith(f"Nothing can be recommended: {reason}")
    assert choose(folder)[0].empty


def test_an_expert_that_is_often_wrong_is_no_guess(written):
    folder = written([row(1.0, "b", expert_accuracy=0.3, chance=0.1)])
    assert choose(folder)[1].startswith("Keep coin with linear")


@pytest.mark.parametrize("accuracy", [0, 98])
def test_limits_that_cannot_be_are_refused(accuracy, folder):
    with pytest.raises(ConfigurationError, match=rf"found accuracy={accuracy}, expected"):
        choose(folder, accuracy=accuracy)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(FileError, match=r"found neither .* make it with `coin run`"):
        choose(tmp_path)


def test_the_command_prints_table_and_reason(folder, capsys):
    limits = ["--accuracy=0.99", "--losses=all", "--memory_mib=25", "--resident_mib=25"]
    assert main(["choose", str(folder), *limits]) == 0
    *_, table, sentence = capsys.readouterr().out.splitlines()
    assert " ".join(table.split()) == "replica replica 103.50 ± 0.00* 100.00 20 24 1 2"
    assert sentence.startswith("Keep replica (100.00 %")
    assert main(["choose", str(folder), "--accuracy=1", "--memory_mib=1"]) == 0
    assert capsys.readouterr().out.strip() == choose(folder, 1, 1)[1]


def test_a_reader_that_goes_away_ends_the_command_quietly(folder):
    to_no_reader = f"{sys.executable} -m coin choose {folder} | true"
    assert subprocess.run(to_no_reader, shell=True, capture_output=True, check=True).stderr == b""
