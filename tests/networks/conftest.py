"""What tests of networks from optional packages share."""

import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function after which importing a package fails."""
    return lambda package: monkeypatch.setitem(sys.modules, package, None)
