"""What tests of networks from optional packages share."""

import builtins
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function after which importing a package fails."""
    real = builtins.__import__

    def hide(package: str) -> None:
        def refuse(name: str, *rest: Any) -> Any:
            if name == package:
                raise ImportError(name)
            return real(name, *rest)

        monkeypatch.setattr(builtins, "__import__", refuse)

    return hide
