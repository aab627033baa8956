"""Every command runs in a folder of its own."""

import pytest


@pytest.fixture(autouse=True)
def own_folder(elsewhere: None) -> None:
    """See `elsewhere`."""
