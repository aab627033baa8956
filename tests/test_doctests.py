"""The examples in the docstrings of all public names are run; each starts from those of the package's docstring."""

import doctest
import gc
import sys
from pathlib import Path

import pytest
import torch

import coin


@pytest.mark.filterwarnings("ignore::coin.errors.CoinWarning")
@pytest.mark.parametrize("name", coin.__all__)
def test_example_does_what_it_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # another test's
    monkeypatch.syspath_prepend(tmp_path)
    Path("mine.py").write_text("def merge(experts, calibration, scale): ...")
    torch.manual_seed(0)
    start: dict[str, object] = {}
    for example in doctest.DocTestParser().get_examples(coin.__doc__ or ""):
        exec(example.source, start)
    own, *of_methods = doctest.DocTestFinder().find(
        getattr(coin, name), name, module=False, globs=start
    )
    assert own.examples
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for each in (own, *of_methods):
        assert runner.run(each).failed == 0
    if name in ("Method", "MergeMethod"):
        gc.collect()  # methods that an example defines must not be found by later tests
