"""What holds for every code, state and table of results, on examples that hypothesis makes up."""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from coin.coding import Code
from coin.errors import ConfigurationError, DecodingError
from coin.files.safetensors import load_state, save_state
from coin.files.tensors import fingerprint
from coin.reporting.results import NUMBERS, Row, read_results, write_results

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]
FEW = settings(max_examples=40, deadline=None, suppress_health_check=SLOW)
SEEDS = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@FEW
@given(st.lists(st.lists(st.floats(-1, 2), min_size=0, max_size=3), min_size=0, max_size=3))
def test_a_code_is_convex_and_decodes_what_it_promises_or_is_refused(rows: list[list[float]]) -> None:
    try:
        code = Code(rows)
    except (ConfigurationError, DecodingError):
        return
    assert bool((code.matrix >= 0).all())
    torch.testing.assert_close(code.matrix.sum(1), torch.ones(code.num_coded, dtype=torch.float64), rtol=0, atol=1e-15)
    assert all(math.isfinite(code.amplification(erased)) for erased in code.erasures())


TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6),
    st.tuples(
        st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]),
        st.lists(st.integers(0, 3), max_size=3),
    ),
    max_size=3,
)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3))


@FEW
@given(TENSORS, st.dictionaries(st.text(max_size=5), JSON, max_size=3), SEEDS)
def test_a_state_reads_back_bit_for_bit(layout: dict[str, Any], made: dict[str, Any], seed: int) -> None:
    state = {name: normal(seed, *shape).mul(9).to(kind) for name, (kind, shape) in layout.items()}
    assume("__metadata__" not in state)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_state(path, state, made)
        found, provenance = load_state(path)
    assert fingerprint(found) == fingerprint(state)
    assert {name: provenance[name] for name in made if name != "versions"} == {
        name: value for name, value in made.items() if name != "versions"
    }


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n+"), min_size=1, max_size=6).filter(
    lambda word: word != "mean"
)
ANY_NUMBER = st.floats(allow_infinity=False)


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    names = draw(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4, unique=True))
    return [
        Row(
            draw(WORDS), draw(st.integers(0, 2**40)), method, "average", "linear", "0", task, task,
            draw(st.integers(0, 10**6)), *(draw(ANY_NUMBER) for _ in NUMBERS),
        )
        for method, task in names
    ]  # fmt: skip


@FEW
@given(rows())
def test_results_read_back_as_they_were_written(written: list[Row]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_results(Path(folder), written, {})
        frame = read_results(Path(folder))
    assert len(frame) == len(written)
    for found, row in zip(frame.itertuples(index=False), written, strict=True):
        for name in frame.columns:
            value, wanted = getattr(found, name), getattr(row, name)
            assert value == wanted or (math.isnan(value) and math.isnan(wanted)), name
