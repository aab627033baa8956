"""Requests and responses of the Open Inference Protocol, without HTTP."""

import gzip
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from coin.data import transform
from coin.errors import DataError
from coin.serving.limits import InputLimits
from coin.serving.protocol import Description, response
from coin.serving.replies import Answer
from coin.serving.requests import EncodingError, Parsed, TooLargeError, parse


@pytest.fixture
def about(tmp_path: Path) -> Description:
    """A description of what is served for texts of a vocabulary of three words."""
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "good": 1, "bad": 2}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Description(
        {"moods": ["sad", "glad"]}, 4, "coin (coded_hedged, refit, linear)", "texts", str(tmp_path / "tokenizer.json")
    )


def read(body: bytes, header: int | None, about: Description, encoding: str = "identity", **limits: int) -> Parsed:
    return parse(body, encoding, header, "moods", about, InputLimits(**limits))


TENSOR = {"name": "texts", "datatype": "BYTES", "shape": [2]}


def body(**changes: Any) -> bytes:
    tensor = {**TENSOR, "data": ["good bad", "bad"]}
    return json.dumps({"id": "a", "inputs": [{**tensor, **changes.pop("tensor", {})}], **changes}).encode()


def test_texts_as_json_and_as_bytes_become_tokens(about: Description) -> None:
    parsed = read(body(), None, about)
    tokens = parsed.read()
    assert parsed.request.id == "a"
    assert tokens.tolist() == [[1, 2, 0, 0], [2, 0, 0, 0]]
    head = json.dumps({"inputs": [TENSOR]}).encode()
    raw = b"".join(struct.pack("<I", len(text)) + text for text in (b"good bad", b"bad"))
    assert torch.equal(read(head + raw, len(head), about).read(), tokens)
    assert about.metadata("moods")["inputs"] == [{"name": "texts", "datatype": "BYTES", "shape": [-1]}]
    for spoilt, message in ((raw[:-1], "ends before"), (raw.replace(b"bad", b"\xff\xff\xff"), "UTF-8")):
        with pytest.raises(DataError, match=message):
            read(head + spoilt, len(head), about)
    with pytest.raises(DataError, match="expected texts"):
        read(body(tensor={"datatype": "UINT8", "data": [1]}), None, about)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_packed_body_is_unpacked_and_bounded(about: Description, encoding: str) -> None:
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    assert torch.equal(read(pack(body()), None, about, encoding).read(), read(body(), None, about).read())
    with pytest.raises(TooLargeError, match="more than 1000 bytes, unpacked"):
        read(pack(bytes(10**6)), None, about, encoding, bytes=1000)
    with pytest.raises(DataError, match="ends before"):
        read(pack(body())[:-1], None, about, encoding)
    with pytest.raises(DataError, match=f"not packed by {encoding}"):
        read(body(), None, about, encoding)
    with pytest.raises(EncodingError, match="packed by br, expected gzip, deflate or none"):
        read(body(), None, about, "br")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "input": ({"tensor": {"name": "words"}}, "an input 'words', expected 'texts'"),
    "output": (
        {"outputs": [{"name": "logits"}]},
        "output 'logits', expected some of probabilities, class, label, risk",
    ),
    "classification": ({"outputs": [{"name": "label", "parameters": {"classification": 2}}]}, "not supported"),
    "rows": ({"tensor": {"shape": [2, 2]}}, "one a row"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_metadata_does_not_offer_is_refused(about: Description, case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        read(body(**changes), None, about)


def test_bytes_after_the_json_are_as_many_as_it_says(about: Description) -> None:
    head = body(tensor={"data": None, "parameters": {"binary_data_size": 5}})
    with pytest.raises(DataError, match="found 3 bytes after the JSON, expected 5 as binary_data_size says"):
        read(head + bytes(3), len(head), about)
    text = body(tensor={"data": None, "parameters": {"binary_data_size": "3"}})
    with pytest.raises(DataError, match="found '3' as binary_data_size, expected a number"):
        read(text + bytes(3), len(text), about)
    with pytest.raises(DataError, match="data and bytes"):
        read(body() + bytes(3), len(body()), about)
    with pytest.raises(DataError, match="expected JSON of 1000000 as its header says"):
        read(head, 10**6, about)


def test_json_of_many_numbers_is_refused_before_it_is_parsed(about: Description) -> None:
    with pytest.raises(TooLargeError, match="expected at most 100; send them in the binary extension"):
        read(body(tensor={"data": [0] * 200}), None, about, values=100)


def test_a_tokenizer_is_read_once(about: Description) -> None:
    read(body(), None, about).read()
    loads = transform._loaded.cache_info().misses
    for _ in range(5):
        read(body(), None, about).read()
    assert transform._loaded.cache_info().misses == loads


def data(told: dict[str, Any]) -> dict[str, Any]:
    return {output["name"]: output["data"] for output in told["outputs"]}


def test_a_response_leaves_out_padded_outputs_and_says_who_answered(about: Description) -> None:
    risk = torch.tensor([0.25], dtype=torch.float64)
    answer = Answer(0, torch.tensor([[0.0, 2.0, 9.0]]), True, ("expert-b", "coded-0"), 0.5, risk, risk < 1)
    every = dict.fromkeys(("probabilities", "class", "label", "risk"), False)
    told, binary = response("moods", None, every, [answer], about)
    assert told["parameters"] == {"decoded": True, "answered_by": "expert-b,coded-0", "seconds": 0.5}
    assert told["outputs"][0]["shape"] == [1, 2]
    found = data(told)
    assert found.pop("probabilities") == pytest.approx([0.1192, 0.8808], abs=1e-4)
    assert found == {"class": [1], "label": ["glad"], "risk": [0.25]}
    assert "id" not in told
    assert not binary


def test_the_risk_is_one_number_an_answer(about: Description) -> None:
    """0 for an expert's own answer, 1 where it is not known: whoever sets a threshold on it is on the safe side."""
    risk = torch.tensor([0.25, torch.nan, 0.0])
    decoded = Answer(0, torch.zeros(3, 3), True, ("coded-0",), 0.5, risk, risk < 0.1)
    own = Answer(0, torch.zeros(3, 3), False, ("expert-a",), 0.5, torch.zeros(3), torch.ones(3, dtype=torch.bool))
    for answer, wanted in ((decoded, [0.25, 1.0, 0.0]), (own, [0.0, 0.0, 0.0])):
        assert data(response("moods", None, {"risk": False}, [answer], about)[0]) == {"risk": wanted}
        told, binary = response("all", None, {"moods.risk": True}, [answer], about)
        assert np.frombuffer(binary, np.float32).tolist() == wanted
        assert told["outputs"][0]["parameters"]["binary_data_size"] == 12


def test_what_the_promise_covers_is_told_where_there_is_one(about: Description) -> None:
    risk = torch.tensor([0.25, torch.nan, 0.0])
    answer = Answer(0, torch.zeros(3, 3), True, ("coded-0",), 0.5, risk, risk < 0.1)
    names = [output["name"] for output in about.metadata("moods")["outputs"]]
    assert "accepted" not in names
    assert not response("moods", None, {"accepted": False}, [answer], about)[0]["outputs"]
    promising = replace(about, promise={"alpha": 0.02, "confidence": 0.95})
    told = promising.metadata("all")
    assert told["outputs"][4] == {"name": "moods.accepted", "datatype": "BOOL", "shape": [-1]}
    assert told["parameters"]["promise.alpha"] == "0.02"
    assert data(response("moods", None, {"accepted": False}, [answer], promising)[0]) == {
        "accepted": [False, False, True]
    }
    _, binary = response("all", None, {"moods.accepted": True}, [answer], promising)
    assert binary == b"\0\0\1"
