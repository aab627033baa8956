"""Requests and responses of the Open Inference Protocol without HTTP, their images, and networks as servers."""

import base64
import json
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

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

PETS = System(
    {"pets": ["cat", "dog"], "cars": ["old", "new", "none"]},
    files={},
    stand_ins=StandIns(PolicyKind.standin, ["expert-pets", "expert-cars"], Code([[0.5, 0.5]])),
    decoders={},
    features=False,
    image_size=32,
)


def read(content: Any, about: System = PETS, **limits: int) -> torch.Tensor:
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return parse(content, next(iter(about.classes)), about, Limits(**limits))[1]


def read_files(*files: bytes, size: int = 32, **limits: int) -> torch.Tensor:
    texts = [base64.b64encode(file).decode() for file in files]
    return read(body(texts), replace(PETS, image_size=size), **limits)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_png_files_are_exact_in_colour_and_grey() -> None:
    colour, grey = noise(20, 20, 3), noise(20, 20)
    found = read_files(encoded(colour), encoded(grey))
    assert torch.equal(found[0], torch.from_numpy(colour).permute(2, 0, 1))
    assert torch.equal(found[1], torch.from_numpy(grey).expand(3, 20, 20))


def test_large_images_become_what_training_would_have_seen(tmp_path: Path) -> None:
    paths = [tmp_path / "wide.jpg", tmp_path / "high.png"]
    for path, shape in zip(paths, ((60, 90, 3), (70, 50, 3)), strict=True):
        Image.fromarray(noise(*shape)).save(path)
    expected = torch.stack([to_square(Image.open(path), 24) for path in paths])
    assert torch.equal(read_files(*(path.read_bytes() for path in paths), size=24), expected)


@pytest.mark.parametrize("shape", [(2, 600), (600, 2)])
def test_a_strip_costs_no_more_than_its_pixels(shape: tuple[int, int]) -> None:
    assert read_files(encoded(noise(*shape))).shape == (1, 3, 32, 32)


GIF = encoded(noise(8, 8), "GIF")
PNG, JPEG = encoded(noise(8, 8, 3)), encoded(noise(64, 64, 3), "JPEG")


@pytest.mark.parametrize(("files", "message", "status"), [
    ([b"hello"], "no whole image", 400), ([GIF], "no whole image", 400), ([JPEG[:400]], "no whole image", 400),
    ([encoded(noise(40, 40, 3), "JPEG")[:-200]], "no whole image", 400), ([b""], "no whole image", 400),
    ([encoded(np.zeros((4, 4), np.uint16))], "8 bits a channel", 400),
    ([PNG, encoded(noise(9, 9))], "different sizes", 400), ([JPEG], "4096 pixels, expected at most 4000", 413),
    ([encoded(noise(50, 50))] * 2, "5000 pixels, expected at most 4000", 413),
    ([PNG] * 3, "found 3 images, expected at most 2", 413),
])  # fmt: skip
def test_what_is_no_image_or_too_large_is_refused(files: list[bytes], message: str, status: int) -> None:
    with pytest.raises(DataError, match=message) as found:
        read_files(*files, pixels=4000, samples=2)
    assert getattr(found.value, "status", 400) == status


def enormous(width: int, height: int) -> bytes:
    """Return the head of a PNG of this size, which is all that is read of it."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG[:8] + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + PNG[33:]


def test_an_enormous_image_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(DataError, match=r"no whole image \(Image size \(400000000 pixels\) exceeds limit"):
        read_files(enormous(20_000, 20_000))


ONE = [base64.b64encode(PNG).decode()]
VALID = json.dumps(body(ONE)).encode()
WRONG = {
    "no JSON": (b"{", "wrong at the body"),
    "no text": (b"\xff\xfe\xfd", "wrong at the body"),
    "deep": (b"[" * 100_000, "wrong at the body"),
    "half a letter": (b'{"id": "\\ud800", "inputs": []}', "wrong at the body"),
    "no inputs": (b"{}", "wrong at inputs"),
    "input": (body(ONE, "words"), "wrong at inputs.0.name"),
    "datatype": (body(ONE, datatype="FP32"), "wrong at inputs.0.datatype"),
    "number": (body([7]), "wrong at inputs.0.data.0"),
    "matrix": (VALID.replace(b"[1]", b"[1, 1]"), "wrong at inputs.0.shape"),
    "text as shape": (VALID.replace(b"[1]", b'["1"]'), "wrong at inputs.0.shape.0"),
    "boolean as shape": (VALID.replace(b"[1]", b"[true]"), "wrong at inputs.0.shape.0"),
    "rows": (VALID.replace(b"[1]", b"[2]"), "one a row"),
    "none": (body([]), "found 0 images"),
    "base64": (body(["%%"]), "no whole image"),
    "too many outputs": (body(ONE, outputs=[{"name": "label"}] * 1001), "wrong at outputs .* at most 1000 items"),
    "output": (
        body(ONE, outputs=[{"name": "logits"}]),
        "output 'logits', expected some of probabilities, class, label, score",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_metadata_does_not_offer_is_refused(case: str) -> None:
    content, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        read(content)


def test_a_query_for_300000_outputs_is_refused_before_they_are_read() -> None:
    content = json.dumps(body(ONE, outputs=[{"name": "label"}] * 300_000)).encode()
    began = time.process_time()
    with pytest.raises(DataError, match="wrong at outputs"):
        read(content)
    assert time.process_time() - began < 1.0  # it took 5.6 seconds


def reply(about: System, answers: list[Answer], model: str, *outputs: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a response, and the data of its outputs by name."""
    asked = InferRequest.model_validate_json(json.dumps(body([], id="7", outputs=[{"name": name} for name in outputs])))
    told = json.loads(json.dumps(response(about, model, asked, answers, 0.5), allow_nan=False))
    return told, {output["name"]: output["data"] for output in told["outputs"]}


def test_a_response_leaves_out_padded_outputs_and_says_who_answered() -> None:
    logits = torch.tensor([[0.0, 2.0, 9.0]])
    answer = Answer(logits, ("expert-cars", "coded-0"), torch.tensor([False]))
    told, found = reply(PETS, [answer], "pets")
    assert told["parameters"] == {"decoded": True, "answered_by": "expert-cars,coded-0", "seconds": 0.5}
    assert (told["id"], told["model_name"], told["outputs"][0]["shape"]) == ("7", "pets", [1, 2])
    assert found.pop("probabilities") == pytest.approx([0.1192, 0.8808], abs=1e-4)
    assert found.pop("score") == pytest.approx([0.1192], abs=1e-4)
    assert found == {"class": [1], "label": ["dog"]}
    own = Answer(logits, ("expert-cars",))
    told, found = reply(PETS, [answer, own], "all", "cars.label", "cars.score")
    assert found == {"cars.label": ["none"], "cars.score": answer_score(logits).tolist()}
    assert told["parameters"] == {"decoded": True, "answered_by": "expert-cars,coded-0", "seconds": 0.5}
    assert told["outputs"][0]["parameters"] == {"decoded": False, "answered_by": "expert-cars"}


def test_what_the_promise_covers_is_told_where_there_is_one() -> None:
    logits, covered = torch.zeros(2, 3), torch.tensor([True, False])
    decoded = Answer(logits, ("coded-0",), covered)
    own = Answer(logits, ("expert-pets",))
    assert "accepted" not in [output["name"] for output in metadata(PETS, "pets")["outputs"]]
    assert "accepted" not in reply(PETS, [decoded], "pets")[1]
    decoder = make_decoder("linear", PETS.stand_ins.code, [0])
    decoder.promises = {0: Promise(0.5, 0.02, 0.95, 1.0, 9, 9)}
    promising = replace(PETS, decoders={(0,): decoder})
    told = metadata(promising, "all")
    assert told["outputs"][4] == {"name": "pets.accepted", "datatype": "BOOL", "shape": [-1]}
    assert (told["parameters"]["promise.alpha"], told["parameters"]["promise.confidence"]) == ("0.02", "0.95")
    for answer, expected in ((decoded, [True, False]), (own, [True, True])):
        assert reply(promising, [answer], "pets")[1]["accepted"] == expected


def test_replies_are_padded_and_those_to_requests_run_together_are_told_apart(
    tmp_path: Path, small_config: NetworkConfig
) -> None:
    path = tmp_path / "expert.safetensors"
    save_network(path, build_network(small_config, 3), small_config, 3, {})
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 1, 12, 12), generator=draw, dtype=torch.uint8)
    plain = NetworkServer(path, 5, features=False)(images)
    assert plain.logits.shape == (3, 5)
    assert not plain.logits[:, 3:].any()
    assert plain.features.shape == (3, 0)
    server = NetworkServer(path, 5, features=True)
    with pytest.raises(DataError, match="expected"):
        server(images.float())
    others = torch.randint(256, (2, 3, 16, 16), generator=draw, dtype=torch.uint8)
    networks = {Path("it"): server, Path("other"): NetworkServer(path, 5, features=True)}
    asked = [("it", images[:1]), ("it", others), ("it", images[1:]), ("other", images)]
    requests = [Request(Path(name), 0, stored) for name, stored in asked]
    for request, found in zip(requests, run_together(networks.__getitem__, requests), strict=True):
        own = networks[request.path](request.images)
        torch.testing.assert_close(found.logits, own.logits)
        torch.testing.assert_close(found.features, own.features)


def test_networks_for_texts_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertConfig(**sizes, vocab_size=20).save_pretrained(tmp_path / "bert")
    config = NetworkConfig(f"hf/{tmp_path}/bert", 6)
    save_network(tmp_path / "text.safetensors", build_network(config, 3), config, 3, {})
    with pytest.raises(ConfigurationError, match="which reads texts, expected a network for images"):
        NetworkServer(tmp_path / "text.safetensors", 3, features=True)
