"""The Open Inference Protocol, version 2, over HTTP: what KServe, Triton and their clients speak.

A model is a task, or ``all`` for every task's answer to the same inputs. Its one input holds images as pixels (UINT8,
``[B, 1 or 3, H, W]``) or as PNG or JPEG files (BYTES, in base64 where they are JSON), or texts (BYTES). Its outputs are
``probabilities`` FP32 ``[B, C]``, ``class`` INT64 ``[B]`` and ``label`` BYTES ``[B]``, with the task before them and a
dot where the model is ``all``. The response's parameters say whether any of it was ``decoded``, which servers it was
``answered_by``, and the ``seconds`` that the front end took; each output's say so of its own task. Of a task, they hold
the ``risk`` of each decoded answer too: the estimated probability that the expert's own would have been another class,
for inputs of its task; null for an expert's own answers, and where it is not known. Inputs may come in the binary
extension; outputs are JSON.
"""

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from coin.data.text import tokenize
from coin.errors import DataError
from coin.serving.images import TooLargeError, read_array, read_files
from coin.serving.limits import InputLimits
from coin.serving.replies import Answer

ALL = "all"
"""The model that answers for every task."""


@dataclass(frozen=True)
class Description:
    """What is served.

    Args:
        classes: The names of every task's classes, in the order of the experts.
        image_size: The side of the networks' inputs in pixels, or the number of their tokens.
        method: The merge method of the coded models.
        decoder: The decoder.
        reads: ``images`` or ``texts``.
        tokenizer: Of texts, a ``tokenizer.json``; none is the packaged encoder's.
    """

    classes: Mapping[str, Sequence[str]]
    image_size: int
    method: str
    decoder: str
    reads: str = "images"
    tokenizer: str | None = None


class InferInput(BaseModel):
    """A request's input."""

    name: str
    shape: list[int] = Field(min_length=1)
    datatype: Literal["UINT8", "BYTES"]
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel):
    """A request."""

    id: str | None = None
    inputs: list[InferInput] = Field(min_length=1, max_length=1)
    outputs: list[dict[str, Any]] | None = None
    parameters: dict[str, Any] = {}


def read_request(body: bytes, header: int | None, about: Description, limits: InputLimits) -> tuple[str | None, Tensor]:
    """Return a request's id and its inputs as a server takes them.

    Args:
        body: JSON, and in the binary extension the input's bytes after it.
        header: The length of the JSON where bytes follow.
        about: What is served.
        limits: What a query may bring.

    Raises:
        DataError: The request is none, or does not fit what is served.
    """
    try:
        request = InferRequest.model_validate_json(body[:header])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise DataError(f"found an inference request that is wrong at {where} ({first['msg']})") from error
    given = request.inputs[0]
    raw = body[header:] if header is not None else b""
    if given.data is None and not raw:
        raise DataError("found an input without data, expected data, or bytes after the JSON")
    if given.datatype == "UINT8":
        if about.reads != "images":
            raise DataError("found an input of UINT8, expected texts as BYTES")
        images = read_array(raw if given.data is None else given.data, given.shape, limits.pixels)
        _check_samples(len(images), limits)
        return request.id, images
    items = _split(raw) if given.data is None else given.data
    if given.shape[0] != len(items):
        raise DataError(f"found {len(items)} values for an input of shape {given.shape}, expected one a row")
    _check_samples(len(items), limits)
    if about.reads == "images":
        return request.id, read_files([_file(item) for item in items], about.image_size, limits.pixels)
    return request.id, tokenize([_text(item) for item in items], about.image_size, about.tokenizer)


def _check_samples(count: int, limits: InputLimits) -> None:
    if not 1 <= count <= limits.samples:
        raise TooLargeError(f"found {count} images or texts, expected 1 to {limits.samples} at a time")


def _split(raw: bytes) -> list[bytes]:
    """Return the values of a binary BYTES tensor, each after its length in four bytes."""
    found, place = [], 0
    while place < len(raw):
        (length,) = struct.unpack_from("<I", raw, place) if place + 4 <= len(raw) else (len(raw),)
        if place + 4 + length > len(raw):
            raise DataError("found a BYTES input that ends before its last value does")
        found.append(raw[place + 4 : place + 4 + length])
        place += 4 + length
    return found


def _file(item: Any) -> bytes:
    try:
        return item if isinstance(item, bytes) else base64.b64decode(item, validate=True)
    except (TypeError, ValueError) as error:
        raise DataError("found a value that is not base64, expected a PNG or JPEG file in base64") from error


def _text(item: Any) -> str:
    try:
        return item.decode() if isinstance(item, bytes) else str(item)
    except UnicodeDecodeError as error:
        raise DataError("found bytes that are no UTF-8, expected a text") from error


def response(model: str, identity: str | None, answers: Sequence[Answer], about: Description) -> dict[str, Any]:
    """Return the response to a request."""
    tasks = list(about.classes)
    outputs = []
    for answer in answers:
        task = tasks[answer.expert]
        probabilities = answer.logits[:, : len(about.classes[task])].softmax(1)
        classes = probabilities.argmax(1).tolist()
        labels = [about.classes[task][index] for index in classes]
        for output, data in zip(
            _outputs(model, task, about), (probabilities.flatten().tolist(), classes, labels), strict=True
        ):
            shape = [len(classes), *output["shape"][1:]]
            outputs.append({**output, "shape": shape, "data": data, "parameters": _parameters([answer])})
    told = {"model_name": model, "model_version": "1", "parameters": _parameters(answers), "outputs": outputs}
    return told if identity is None else {**told, "id": identity}


def _outputs(model: str, task: str, about: Description) -> list[dict[str, Any]]:
    """Return the outputs of a task: their names, types and shapes."""
    prefix, classes = f"{task}." if model == ALL else "", len(about.classes[task])
    return [
        {"name": f"{prefix}probabilities", "datatype": "FP32", "shape": [-1, classes]},
        {"name": f"{prefix}class", "datatype": "INT64", "shape": [-1]},
        {"name": f"{prefix}label", "datatype": "BYTES", "shape": [-1]},
    ]


def _parameters(answers: Sequence[Answer]) -> dict[str, Any]:
    by = dict.fromkeys(name for answer in answers for name in answer.answered_by)
    decoded = any(answer.decoded for answer in answers)
    told = {"decoded": decoded, "answered_by": ",".join(by), "seconds": max(answer.seconds for answer in answers)}
    if len(answers) == 1:
        risk = None if answers[0].risk is None else answers[0].risk.tolist()
        told["risk"] = risk and [None if math.isnan(each) else each for each in risk]
    return told


def model_metadata(model: str, about: Description) -> dict[str, Any]:
    """Return what the protocol says of a model; ``parameters`` holds the names of its classes."""
    tasks = list(about.classes) if model == ALL else [model]
    is_image = about.reads == "images"
    shape, datatype = ([-1, 3, about.image_size, about.image_size], "UINT8") if is_image else ([-1], "BYTES")
    return {
        "name": model,
        "versions": ["1"],
        "platform": f"coin ({about.method}, {about.decoder})",
        "inputs": [{"name": about.reads, "datatype": datatype, "shape": shape}],
        "outputs": [output for task in tasks for output in _outputs(model, task, about)],
        "parameters": {f"{task}.classes": ",".join(about.classes[task]) for task in tasks},
    }
