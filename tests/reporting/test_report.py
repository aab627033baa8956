"""The page of an experiment and of a seed: whole, self-contained, and of the files' numbers."""

import base64
import math
import re
from html import unescape

import pytest

from coin.errors import FileError
from coin.reporting import standin_table, standins, write_report
from coin.reporting.results import write_results
from coin.reporting.summary import read_run
from tests.reporting.conftest import row


class Page:
    """What a page says: its text without tags, and the cells of its table."""

    def __init__(self, path):
        self.text = path.read_text(encoding="utf-8")
        self.said = " ".join(unescape(re.sub("<[^>]*>", " ", self.text)).split())
        cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", self.text)
        self.cells = [unescape(cell) for cell in cells]


def test_a_page_says_what_was_run_and_needs_nothing_from_outside(experiment):
    path = write_report(experiment)
    assert path == experiment / "report.html"
    page = Page(path)
    assert re.findall(r"https?:|url\(|<script", page.text) == []
    plot = base64.b64encode((experiment / "plots/nda_against_memory.png").read_bytes()).decode()
    assert re.findall(' src="([^"]*)"', page.text) == [f"data:image/png;base64,{plot}"]
    assert "network: name: small_resnet" in page.said
    assert re.search(r"20\d\d-\d\d-\d\dT.* torch ", page.said)
    assert str(experiment) not in page.text


def test_the_table_is_that_of_the_terminal_with_the_oracle(experiment):
    page = Page(write_report(experiment))
    table = standin_table(standins(read_run(experiment)[1], oracle=True))
    assert [cell for cell in page.cells if cell] == [*table, *table.to_numpy().ravel()]
    assert "oracle" in page.cells


def test_one_seed_alone_claims_no_spread(experiment):
    path = write_report(experiment / "seed-2", experiment / "page.html")
    assert path == experiment / "page.html"
    page = Page(path)
    assert "nan" not in page.said
    assert re.findall(r"\d ± \d", page.said) == []


HOSTILE = "<script>alert(1)</script>\"'&$x_{1}$"


def test_hostile_names_are_escaped(tmp_path):
    own = {"experiment": HOSTILE, "method": HOSTILE, "decoder": HOSTILE}
    write_results(tmp_path, [row(0.9, HOSTILE, **own)], {"name": HOSTILE, HOSTILE: [HOSTILE]})
    page = Page(write_report(tmp_path))
    assert "<script" not in page.text
    assert HOSTILE in page.said  # shown as it stands
    assert page.cells.count(HOSTILE) == 2


def test_an_expert_that_is_never_right_leaves_a_page_without_a_recommendation(written):
    never = row(math.nan, "b", expert_accuracy=0.0, decoded_accuracy=0.0)
    page = Page(write_report(written([row(0.9), never])))
    assert "Nothing can be recommended: no stand-in has a known NDA and memory." in page.said
    assert "Experts, own accuracy in %: a 90.00, b 0.00" in page.said


@pytest.mark.parametrize("folder", ["", "nothing"])
def test_what_cannot_be_reported_is_one_clear_line(folder, tmp_path):
    with pytest.raises(FileError, match=r"coin run[^\n]*$"):
        write_report(tmp_path / folder)
