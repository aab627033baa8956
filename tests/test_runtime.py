import os

import pytest

from coin.__main__ import tune_process


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_what_the_user_has_set_stands(given, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", {"MALLOC_MMAP_MAX_": "65536", **given})
    tune_process()
    assert os.environ == {"MALLOC_MMAP_MAX_": "65536", **expected}
