"""Requests and responses of the Open Inference Protocol without HTTP, their images, and networks as servers."""

import base64
import json
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig

from coin.coding import Code, Promise, make_decoder
from coin.coding.promise import answer_score
from coin.data.image_io import to_square
from coin.errors import ConfigurationError, DataError
from coin.networks import NetworkConfig, build_network, save_network
from coin.serving.limits import Limits
from coin.serving.policies import PolicyKind, StandIns
from coin.serving.protocol import InferRequest, metadata, parse, response
from coin.serving.servers import NetworkServer, Request, run_together
from coin.serving.system import Answer, System
from tests.serving.conftest import body, encoded

CODE = Code([[0.5, 0.5]])
PETS = System(
    {"pets": ["cat", "dog"], "cars": ["old", "new", "none"]},
    files={},
    stand_ins=StandIns(PolicyKind.standin, ["expert-pets", "expert-cars"], CODE),
    decoders={},
    features=False,
    image_size=32,
)


def read(request, size=32, **limits):
    """The images of a request."""
    sent = json.dumps(request).encode()
    _, images = parse(sent, "pets", replace(PETS, image_size=size), Limits(**limits))
    return images


def read_files(*files, **options):
    texts = [base64.b64encode(file).decode() for file in files]
    return read(body(texts), **options)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# Images.


def test_png_files_are_exact_in_colour_and_grey():
    colour = noise(20, 20, 3)
    grey = noise(20, 20)
    found = read_files(encoded(colour), encoded(grey))
    assert torch.equal(found[0], torch.from_numpy(colour).permute(2, 0, 1))
    assert torch.equal(found[1], torch.from_numpy(grey).expand(3, 20, 20))


@pytest.mark.parametrize(
    ("shape", "format"), [((60, 90, 3), "JPEG"), ((70, 50, 3), "PNG"), ((2, 600), "PNG")]
)
def test_large_images_become_what_training_would_have_seen(tmp_path, shape, format):
    path = tmp_path / "image"
    path.write_bytes(encoded(noise(*shape), format))
    found = read_files(path.read_bytes(), size=24)
    assert torch.equal(found, to_square(Image.open(path), 24)[None])


def enormous():
    """The head of a file of 400 million pixels, which is all that is read of it."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return PNG[:8] + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + PNG[33:]


PNG = encoded(noise(8, 8, 3))
NO_IMAGES = {
    "text": ([b"hello"], "no whole image", 400),
    "gif": ([encoded(noise(8, 8), "GIF")], "no whole image", 400),
    "half": ([encoded(noise(60, 60, 3), "JPEG")[:-200]], "no whole image", 400),
    "16 bits": ([encoded(np.zeros((4, 4), np.uint16))], "8 bits a channel", 400),
    "two sizes": ([PNG, encoded(noise(9, 9))], "different sizes", 400),
    "large together": ([encoded(noise(50, 50))] * 2, "5000 pixels, expected at most 4000", 413),
    "many": ([PNG] * 3, "found 3 images, expected at most 2", 413),
    "enormous": ([enormous()], r"no whole image \(Image size \(400000000 pixels\)", 400),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_or_too_large_is_refused(name):
    files, message, status = NO_IMAGES[name]
    with pytest.raises(DataError, match=message) as found:
        read_files(*files, pixels=4000, samples=2)
    assert getattr(found.value, "status", 400) == status


# Requests.

ONE = [base64.b64encode(PNG).decode()]
WRONG = {
    "no inputs": ({}, "wrong at inputs"),
    "input": (body(ONE, "words"), "wrong at inputs.0.name"),
    "text as shape": (body(ONE, shape=["1"]), "wrong at inputs.0.shape.0"),
    "rows": (body(ONE, shape=[2]), "one a row"),
    "none": (body([]), "found 0 images"),
    "base64": (body(["%%"]), "no whole image"),
    "output": (body(ONE, outputs=[{"name": "logits"}]), "expected some of probabilities, class"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_metadata_does_not_offer_is_refused(name):
    request, message = WRONG[name]
    with pytest.raises(DataError, match=message):
        read(request)


def test_a_query_for_300000_outputs_is_refused_before_they_are_read():
    request = body(ONE, outputs=[{"name": "label"}] * 300_000)
    began = time.process_time()
    with pytest.raises(DataError, match=r"wrong at outputs .*at most 1000 items"):
        read(request)
    assert time.process_time() - began < 1.0  # it took 5.6 seconds


# Responses.

LOGITS = torch.tensor([[0.0, 2.0, 9.0]])
DECODED = Answer(LOGITS, ("expert-cars", "coded-0"), torch.tensor([False]))
OWN = Answer(LOGITS, ("expert-cars",))


def responded(system, model, answers, outputs=()):
    """A response as it is sent, and the data of its outputs by name."""
    request = body([], id="7", outputs=[{"name": name} for name in outputs])
    asked = InferRequest.model_validate_json(json.dumps(request))
    found = response(system, model, asked, answers, 0.5)
    sent = json.loads(json.dumps(found, allow_nan=False))
    return sent, {output["name"]: output["data"] for output in sent["outputs"]}


def test_a_response_leaves_out_padded_outputs():
    found, data = responded(PETS, "pets", [DECODED])
    assert (found["id"], found["model_name"]) == ("7", "pets")
    assert found["outputs"][0]["shape"] == [1, 2]
    probabilities = LOGITS[0, :2].softmax(0).tolist()
    assert data.pop("probabilities") == pytest.approx(probabilities)
    assert data.pop("score") == pytest.approx([1 - max(probabilities)])
    assert data == {"class": [1], "label": ["dog"]}


def test_a_response_says_who_answered_and_has_the_outputs_that_were_asked_for():
    found, data = responded(PETS, "all", [DECODED, OWN], ["cars.label", "cars.score"])
    assert data == {"cars.label": ["none"], "cars.score": answer_score(LOGITS).tolist()}
    answered = {"decoded": True, "answered_by": "expert-cars,coded-0", "seconds": 0.5}
    assert found["parameters"] == answered
    assert found["outputs"][0]["parameters"] == {"decoded": False, "answered_by": "expert-cars"}


def test_what_the_promise_covers_is_told():
    decoder = make_decoder("linear", CODE, [0])
    decoder.promises = {0: Promise(0.5, 0.02, 0.95, 1.0, 9, 9)}
    promising = replace(PETS, decoders={(0,): decoder})
    about = metadata(promising, "all")
    assert about["outputs"][4] == {"name": "pets.accepted", "datatype": "BOOL", "shape": [-1]}
    classes = {"pets.classes": "cat,dog", "cars.classes": "old,new,none"}
    promise = {"promise.alpha": "0.02", "promise.confidence": "0.95"}
    assert about["parameters"] == classes | promise
    for answer, expected in ((DECODED, [False]), (OWN, [True])):
        _, data = responded(promising, "pets", [answer])
        assert data["accepted"] == expected


# Networks as servers.


@pytest.fixture
def path(tmp_path, small_config):
    path = tmp_path / "expert.safetensors"
    save_network(path, build_network(small_config, 3), small_config, 3, {})
    return path


def stored(*shape):
    return torch.from_numpy(noise(*shape))


def test_logits_are_padded_and_features_are_sent_where_a_decoder_reads_them(path):
    images = stored(3, 1, 12, 12)
    plain = NetworkServer(path, 5, features=False)(images)
    assert plain.logits.shape == (3, 5)
    assert not plain.logits[:, 3:].any()
    assert plain.features.shape == (3, 0)
    server = NetworkServer(path, 5, features=True)
    assert server(images).features.any()
    with pytest.raises(DataError, match="expected"):
        server(images.float())


def test_replies_to_requests_that_run_together_are_told_apart(path):
    servers = {Path(name): NetworkServer(path, 5, features=True) for name in ("one", "other")}
    images = stored(3, 1, 12, 12)
    requests = [
        Request(Path("one"), 0, images[:1]),
        Request(Path("one"), 0, stored(2, 3, 16, 16)),
        Request(Path("one"), 0, images[1:]),
        Request(Path("other"), 0, images),
    ]
    replies = run_together(servers.__getitem__, requests)
    for request, found in zip(requests, replies, strict=True):
        expected = servers[request.path](request.images)
        torch.testing.assert_close(found, expected)


def test_networks_for_texts_are_refused(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertConfig(**sizes, intermediate_size=8, vocab_size=20).save_pretrained(tmp_path / "bert")
    config = NetworkConfig(f"hf/{tmp_path}/bert", 6)
    path = tmp_path / "text.safetensors"
    save_network(path, build_network(config, 3), config, 3, {})
    with pytest.raises(
        ConfigurationError, match="which reads texts, expected a network for images"
    ):
        NetworkServer(path, 3, features=True)
