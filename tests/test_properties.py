"""What holds for every code, state and table of results, on examples that hypothesis makes up."""

import math
import tempfile
from pathlib import Path

import pandas as pd
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from coin.coding import Code
from coin.errors import ConfigurationError, DecodingError
from coin.files.safetensors import load_state, save_state
from coin.files.tensors import fingerprint
from coin.reporting.results import COLUMNS, TYPES, Row, read_results, write_results

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
WEIGHTS = st.lists(st.floats(-1, 2), max_size=3)


@FEW
@given(st.lists(WEIGHTS, max_size=3))
def test_a_code_is_convex_and_decodes_what_it_promises_or_is_refused(rows):
    try:
        code = Code(rows)
    except (ConfigurationError, DecodingError):
        return
    assert bool((code.matrix >= 0).all())
    ones = torch.ones(code.num_coded, dtype=torch.float64)
    torch.testing.assert_close(code.matrix.sum(1), ones, rtol=0, atol=1e-15)
    assert all(math.isfinite(code.amplification(erased)) for erased in code.erasures())


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
SHAPES = st.lists(st.integers(0, 3), max_size=3)
KINDS = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool])
LAYOUTS = st.dictionaries(NAMES, st.tuples(KINDS, SHAPES), max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3),
)


@FEW
@given(LAYOUTS, st.dictionaries(st.text(max_size=5), JSON, max_size=3))
def test_a_state_reads_back_bit_for_bit(layout, made):
    assume("__metadata__" not in layout)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, (kind, shape) in layout.items():
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        state[name] = normal.mul(9).to(kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_state(path, state, made)
        found, provenance = load_state(path)
    assert fingerprint(found) == fingerprint(state)
    assert provenance | made == provenance


VALUES = {
    "str": st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=6),
    "int64": st.integers(0, 2**40),
    "float64": st.floats(allow_infinity=False),
}
ROWS = st.builds(Row, **{column: VALUES[TYPES[column]] for column in COLUMNS})


@settings(FEW, max_examples=15)
@given(st.lists(ROWS, min_size=1, max_size=4))
def test_results_read_back_as_they_were_written(rows):
    with tempfile.TemporaryDirectory() as folder:
        write_results(Path(folder), rows, {})
        found = read_results(Path(folder))
    written = pd.DataFrame([vars(row) for row in rows]).astype(TYPES)
    pd.testing.assert_frame_equal(found, written, check_exact=True)
