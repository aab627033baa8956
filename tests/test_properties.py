"""What holds for every code, decoder, merge, state and table of results, on examples that hypothesis makes up."""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from coin.coding import Answers, Code, DecoderConfig, LinearDecoder, make_decoder
from coin.errors import ConfigurationError, DecodingError
from coin.files.safetensors import load_state, save_state
from coin.files.tensors import fingerprint, weighted_sum
from coin.merging.average import average_parameters
from coin.merging.coin import coin_parameters
from coin.reporting.results import NUMBERS, Row, read_results, write_results

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]
FEW = settings(max_examples=40, deadline=None, suppress_health_check=SLOW)
SEEDS = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def convex_rows(draw: st.DrawFn, experts: int) -> list[float]:
    parts = [draw(st.integers(1, 20)) for _ in range(experts)]
    return [part / sum(parts) for part in parts]


@st.composite
def codes(draw: st.DrawFn) -> Code:
    experts = draw(st.integers(1, 4))
    rows = [draw(convex_rows(experts)) for _ in range(draw(st.integers(1, 3)))]
    try:
        code = Code(rows)
    except DecodingError:
        assume(False)
    assume(code.worst_amplification() < 1e3)
    return code


@FEW
@given(codes(), SEEDS, st.integers(1, 5), st.integers(1, 4))
def test_the_linear_decoder_undoes_the_code(code: Code, seed: int, samples: int, classes: int) -> None:
    experts = normal(seed, code.num_experts, samples, classes)
    answers = Answers(experts, code.encode(experts))
    for erased in code.erasures():
        lost = experts.clone()
        lost[list(erased)] = torch.nan
        decoded = LinearDecoder(code, erased).decode(Answers(lost, answers.coded))
        tolerance = 1e-12 * code.amplification(erased) * 100
        torch.testing.assert_close(decoded, experts[list(erased)], rtol=0, atol=tolerance)


@FEW
@given(codes(), SEEDS)
def test_an_error_of_the_coded_outputs_grows_by_no_more_than_the_amplification(code: Code, seed: int) -> None:
    experts = normal(seed, code.num_experts, 3, 2)
    error = normal(seed + 1, code.num_coded, 3, 2)
    for erased in code.erasures():
        decoded = LinearDecoder(code, erased).decode(Answers(experts, code.encode(experts) + error))
        grown = (decoded - experts[list(erased)]).norm()
        assert grown <= error.norm() * code.amplification(erased) * (1 + 1e-9) + 1e-9


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


@FEW
@given(st.integers(2, 4), st.integers(1, 2), st.sampled_from(["ridge", "feature_ridge"]), SEEDS)
def test_a_calibrated_decoder_reads_nothing_of_the_lost_expert(experts: int, coded: int, kind: str, seed: int) -> None:
    logits, rows = normal(seed, experts, 12, 3), normal(seed + 1, coded, 12, 3)
    features = [normal(seed + 2 + i, 12, 2) for i in range(experts + coded)]
    answers = Answers(logits, rows, features[:experts], features[experts:])
    code = Code(torch.full((1, experts), 1 / experts, dtype=torch.float64))
    decoder = make_decoder(DecoderConfig.of(kind), code, [0]).fit(answers)
    spoilt = logits.clone()
    spoilt[0] = torch.nan
    empty = [torch.full_like(features[0], torch.nan), *features[1:experts]]
    found = decoder.decode(Answers(spoilt, rows, empty, features[experts:]))
    assert found.equal(decoder.decode(answers))
    assert bool(torch.isfinite(found).all())


def states(seed: int, experts: int, scale: float = 1.0) -> list[dict[str, torch.Tensor]]:
    return [{"a": normal(seed + i, 3, 2) * scale, "b": normal(seed + i + 50, 4) * scale} for i in range(experts)]


def fishers(seed: int, experts: int) -> list[dict[str, torch.Tensor]]:
    return [{name: value.square() for name, value in state.items()} for state in states(seed + 99, experts)]


@FEW
@given(st.integers(2, 4), SEEDS, st.data())
def test_every_entry_of_a_merge_lies_between_the_experts(experts: int, seed: int, data: st.DataObject) -> None:
    weights = data.draw(convex_rows(experts))
    own = states(seed, experts)
    for merged in (average_parameters(own, weights), coin_parameters(own, fishers(seed, experts), weights)):
        for name, value in merged.items():
            every = torch.stack([state[name] for state in own])
            assert bool((value >= every.amin(0) - 1e-9).all())
            assert bool((value <= every.amax(0) + 1e-9).all())


@FEW
@given(st.integers(1, 4), SEEDS, st.data())
def test_a_weighted_sum_of_equal_states_is_that_state(count: int, seed: int, data: st.DataObject) -> None:
    (state,) = states(seed, 1)
    total = weighted_sum([state] * count, data.draw(convex_rows(count)))
    assert fingerprint(total) == fingerprint(state)


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
