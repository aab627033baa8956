"""The examples in docstrings of the library are run."""

import doctest
import gc
from importlib import import_module

import pytest
import torch

import coin

MODULES = sorted({getattr(coin, name).__module__ for name in coin.__all__})


@pytest.mark.filterwarnings("ignore::coin.errors.CoinWarning")
@pytest.mark.parametrize("name", MODULES)
def test_examples_do_what_they_say(name):
    torch.manual_seed(0)
    assert doctest.testmod(import_module(name)).failed == 0
    gc.collect()  # methods that an example defines must not be found by later tests


def test_the_names_that_a_researcher_needs_have_examples():
    """Merging, decoding, risk, faults, files, several losses."""
    needed = [coin.merge_networks, coin.Coded, coin.evaluate, coin.decoding_risk]
    needed += [coin.fault_score, coin.parity_residual, coin.parity_significance, coin.uniform, coin.convex]
    needed += [coin.CodedModel, coin.MergeMethod, coin.Method]
    assert [each.__name__ for each in needed if ">>>" not in (each.__doc__ or "")] == []
