"""The Open Inference Protocol, version 2, in JSON over HTTP, as used by KServe, Triton and their clients.

A model is a task, or ``all`` for every task's answer to the same inputs. Its one input is ``images``, as pixels (UINT8,
``[B, 1 or 3, H, W]``) or as PNG or JPEG files in base64 (BYTES, ``[B]``). Its outputs are ``probabilities`` FP32
``[B, C]``, ``class`` INT64 ``[B]``, ``label`` BYTES ``[B]`` and ``score`` FP32 ``[B]``, one minus the largest
probability, with the task before them and a dot where the model is ``all``. Where the run holds a promise, ``accepted``
BOOL ``[B]`` says whether it covers the answer, as it does an expert's own: accepted answers differ from the expert's
with a probability of at most ``promise.alpha``, a parameter of the model. The response's parameters, and each output's,
say whether any of it was ``decoded`` and which servers it was ``answered_by``; ``seconds`` is the time that these took.
"""

import base64
import io
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from coin.coding.promise import answer_score
from coin.data.image_io import DAMAGE, to_square
from coin.errors import DataError, first_line
from coin.serving.front_end import Answer, Limits

Decode = Callable[[], Tensor]
ALL = "all"  # the model that answers for every task


class RefusedError(DataError):
    """A query is refused with this status of HTTP, by default 400."""

    def __init__(self, told: str, status: int = 400) -> None:
        super().__init__(told)
        self.status = status


@dataclass(frozen=True)
class Description:
    """A description of the served system."""

    classes: Mapping[str, Sequence[str]]  # the names of every task's classes, in the order of the experts
    image_size: int  # the side of the networks' inputs
    platform: str  # the policy, the merge method and the decoder
    promise: Mapping[str, float] | None = None  # `alpha` and `confidence`; None leaves out the output `accepted`

    def outputs(self, model: str) -> dict[str, list[dict[str, Any]]]:
        """Return the names, types and shapes of a model's outputs, by task."""
        kinds = {"probabilities": "FP32", "class": "INT64", "label": "BYTES", "score": "FP32"}
        kinds |= {"accepted": "BOOL"} if self.promise else {}
        prefixes = {task: f"{task}." for task in self.classes} if model == ALL else {model: ""}
        return {
            task: [
                {"name": prefix + name, "datatype": kind, "shape": [-1, len(self.classes[task])][: 1 + (place == 0)]}
                for place, (name, kind) in enumerate(kinds.items())
            ]
            for task, prefix in prefixes.items()
        }

    def metadata(self, model: str) -> dict[str, Any]:
        """Return the protocol's model metadata; ``parameters`` holds the class names and the promise."""
        outputs, shape = self.outputs(model), [-1, 3, self.image_size, self.image_size]
        parameters = {f"{task}.classes": ",".join(self.classes[task]) for task in outputs}
        parameters |= {f"promise.{name}": str(value) for name, value in (self.promise or {}).items()}
        return {
            "name": model, "versions": ["1"], "platform": self.platform, "parameters": parameters,
            "inputs": [{"name": "images", "datatype": "UINT8", "shape": shape}],
            "outputs": [*chain.from_iterable(outputs.values())],
        }  # fmt: skip

    def response(self, model: str, request: "InferRequest", answers: Sequence[Answer], time: float) -> dict[str, Any]:
        """Return the response to a request, after so many seconds."""
        asked, outputs = {output.get("name") for output in request.outputs}, []
        for answer in answers:
            task, names = list(self.classes.items())[answer.expert]
            logits = answer.reply.logits[:, : len(names)]
            classes, accepted = logits.argmax(1).tolist(), answer.reply.accepted
            accepted = torch.full((len(classes),), not answer.decoded) if accepted is None else accepted
            labels, probabilities = [names[each] for each in classes], logits.softmax(1).flatten().tolist()
            columns = probabilities, classes, labels, answer_score(logits).tolist(), accepted.tolist()
            for output, data in zip(self.outputs(model)[task], columns, strict=False):  # the last one where promised
                if not asked or output["name"] in asked:
                    shape = [len(classes), *output["shape"][1:]]
                    outputs.append({**output, "shape": shape, "data": data, "parameters": _parameters([answer])})
        parameters = {**_parameters(answers), "seconds": time}
        told = {"model_name": model, "model_version": "1", "parameters": parameters, "outputs": outputs}
        return told if request.id is None else {**told, "id": request.id}


def _parameters(answers: Sequence[Answer]) -> dict[str, Any]:
    by = dict.fromkeys(name for answer in answers for name in answer.answered_by)
    return {"decoded": any(answer.decoded for answer in answers), "answered_by": ",".join(by)}


class InferInput(BaseModel):
    """A request's input."""

    name: str
    shape: list[int] = Field(min_length=1)
    datatype: Literal["UINT8", "BYTES"]
    data: list[Any]


class InferRequest(BaseModel):
    """A request."""

    id: str | None = None
    inputs: list[InferInput] = Field(min_length=1, max_length=1)
    outputs: list[dict[str, Any]] = []


def parse(body: bytes, model: str, about: Description, limits: Limits) -> tuple[InferRequest, int, Decode]:
    """Return a request for a model, its images' number of pixels, and what decodes these; both raise DataError."""
    try:
        request = InferRequest.model_validate_json(body)
        json.loads(body, object_pairs_hook=_distinct)  # pydantic takes the last of keys that come twice
    except ValidationError as error:
        where, why = ".".join(map(str, (first := error.errors()[0])["loc"])) or "the body", first["msg"]
        raise DataError(f"found an inference request that is wrong at {where} ({why})") from error
    given, known = request.inputs[0], [each["name"] for own in about.outputs(model).values() for each in own]
    if unknown := [output.get("name") for output in request.outputs if output.get("name") not in known]:
        raise DataError(f"found output '{unknown[0]}', expected some of {', '.join(known)}")
    if given.name != "images":
        raise DataError(f"found an input '{given.name}', expected 'images'")
    if not 1 <= given.shape[0] <= limits.samples:
        told = f"found {given.shape[0]} images, expected 1 to {limits.samples} at a time"
        raise RefusedError(told, 413 if given.shape[0] > 0 else 400)
    if given.datatype == "BYTES" and not given.shape[0] == math.prod(given.shape) == len(given.data):
        raise DataError(f"found {len(given.data)} values for an input of shape {given.shape}, expected one a row")
    images = list(map(open_file, given.data)) if given.datatype == "BYTES" else images_of(given.data, given.shape)
    sizes = [image.width * image.height for image in images]
    if max(sizes) > limits.pixels:
        raise RefusedError(f"found an image of {max(sizes)} pixels, expected at most {limits.pixels}; shrink it", 413)
    return request, sum(sizes), partial(to_squares, images, about.image_size)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; DataError if two of its keys are the same."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DataError(f"found key '{key[:40]}' twice, expected it once")
        found[key] = value
    return found


def open_file(text: Any) -> Image.Image:
    """Open a PNG or JPEG image in base64 without decoding it; raises `DataError` if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit on pixels is ours
            image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG", "JPEG"))
    except Image.DecompressionBombError as error:  # PIL's own limit, which is far above ours
        told = f"found an image of more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, expected fewer"
        raise RefusedError(f"{told}; shrink it", 413) from error
    except (TypeError, *DAMAGE) as error:
        raise DataError("found no image, expected a PNG or JPEG file in base64") from error
    if image.mode.startswith(("I", "F")):
        raise DataError(f"found pixels of type {image.mode}, expected 8 bits a channel; convert the image first")
    return image


def images_of(values: Sequence[object], shape: Sequence[int]) -> list[Image.Image]:
    """Return images of numbers from 0 to 255, nested or not, of shape ``[B, 1 or 3, H, W]``; else a DataError."""
    if len(shape) != 4 or shape[1] not in (1, 3) or min(shape) < 1:
        raise DataError(f"found an array of shape {list(shape)}, expected [B, 1 or 3, H, W]")
    try:
        found = np.array(values).reshape(shape)
    except ValueError as error:
        raise DataError(f"found data that is no array {list(shape)} ({first_line(error)}), expected it") from error
    if found.dtype.kind not in "iu" or found.min() < 0 or found.max() > 255:
        raise DataError("found values that are no pixels, expected whole numbers from 0 to 255")
    array = found.astype(np.uint8)
    return list(map(Image.fromarray, array[:, 0] if shape[1] == 1 else array.transpose(0, 2, 3, 1)))


def to_squares(images: Sequence[Image.Image], image_size: int) -> Tensor:
    """Return images prepared like a task's own, once for all servers: uint8 ``[B, 3, S, S]``, S the input size.

    Square images of one smaller size keep that size; others are centre-cropped. Raises `DataError` if one is damaged,
    or small ones differ in size.
    """
    try:
        sides = [image.width if image.width == image.height <= image_size else image_size for image in images]
        squares = [torch.tensor(to_square(image, side)) for image, side in zip(images, sides, strict=True)]
    except DAMAGE as error:
        raise DataError(f"found a damaged image ({first_line(error)}), expected PNG or JPEG") from error
    if len({square.shape for square in squares}) > 1:
        raise DataError(f"found small images of different sizes, expected one; resize them to {image_size} pixels")
    return torch.stack(squares)
