"""Requests and responses of the Open Inference Protocol, without HTTP."""

import json
import struct
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from coin.errors import DataError
from coin.serving.limits import InputLimits
from coin.serving.protocol import Description, model_metadata, read_request, response
from coin.serving.replies import Answer


@pytest.fixture
def about(tmp_path: Path) -> Description:
    """A description of what is served for texts of a vocabulary of three words."""
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "good": 1, "bad": 2}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Description({"moods": ["sad", "glad"]}, 4, "refit", "linear", "texts", str(tmp_path / "tokenizer.json"))


def test_texts_as_json_and_as_bytes_become_tokens(about: Description) -> None:
    tensor = {"name": "texts", "datatype": "BYTES", "shape": [2]}
    body = json.dumps({"id": "a", "inputs": [{**tensor, "data": ["good bad", "bad"]}]}).encode()
    identity, tokens = read_request(body, None, about, InputLimits())
    assert identity == "a"
    assert tokens.tolist() == [[1, 2, 0, 0], [2, 0, 0, 0]]
    head = json.dumps({"inputs": [tensor]}).encode()
    raw = b"".join(struct.pack("<I", len(text)) + text for text in (b"good bad", b"bad"))
    assert torch.equal(read_request(head + raw, len(head), about, InputLimits())[1], tokens)
    assert model_metadata("moods", about)["inputs"] == [{"name": "texts", "datatype": "BYTES", "shape": [-1]}]
    for spoilt, message in ((raw[:-1], "ends before"), (raw.replace(b"bad", b"\xff\xff\xff"), "UTF-8")):
        with pytest.raises(DataError, match=message):
            read_request(head + spoilt, len(head), about, InputLimits())
    images = json.dumps({"inputs": [{**tensor, "datatype": "UINT8", "data": [1]}]}).encode()
    with pytest.raises(DataError, match="expected texts"):
        read_request(images, None, about, InputLimits())


def test_a_response_leaves_out_padded_outputs_and_says_who_answered(about: Description) -> None:
    answer = Answer(0, torch.tensor([[0.0, 2.0, 9.0]]), True, ("expert-b", "coded-0"), 0.5)
    told = response("moods", None, [answer], about)
    assert told["parameters"] == {"decoded": True, "answered_by": "expert-b,coded-0", "seconds": 0.5, "risk": None}
    probabilities, classes, labels = told["outputs"]
    assert probabilities["shape"] == [1, 2]
    assert probabilities["data"] == pytest.approx([0.1192, 0.8808], abs=1e-4)
    assert (classes["data"], labels["data"]) == ([1], ["glad"])
    assert "id" not in told


def test_a_response_says_the_risk_of_every_decoded_answer(about: Description) -> None:
    risky = Answer(0, torch.zeros(3, 3), True, ("coded-0",), 0.5, torch.tensor([0.25, torch.nan, 0.0]))
    told = response("moods", None, [risky], about)
    assert told["parameters"]["risk"] == [0.25, None, 0.0]
    assert all(output["parameters"]["risk"] == [0.25, None, 0.0] for output in told["outputs"])
    own = Answer(0, torch.zeros(3, 3), False, ("expert-a",), 0.5)
    both = response("all", None, [risky, own], about)
    assert "risk" not in both["parameters"]  # there are as many as tasks
    assert [output["parameters"]["risk"] for output in both["outputs"]] == [[0.25, None, 0.0]] * 3 + [None] * 3
