"""The Open Inference Protocol, version 2, in JSON over HTTP, as used by KServe, Triton and their clients.

A model is a task, or ``all`` for every task's answer to the same inputs. Its one input is ``images``: PNG or JPEG files
in base64 (BYTES, ``[B]``). Its outputs are ``probabilities`` FP32 ``[B, C]``, ``class`` INT64 ``[B]``, ``label`` BYTES
``[B]`` and ``score`` FP32 ``[B]``, one minus the largest probability, with the task before them and a dot where the
model is ``all``. Where the run holds a promise, ``accepted`` BOOL ``[B]`` says whether it covers the answer, as it does
an expert's own: accepted answers differ from the expert's with a probability of at most ``promise.alpha``, a parameter
of the model. The response's parameters, and each output's, say whether any of it was ``decoded`` and which servers it
was ``answered_by``; ``seconds`` is the time that these took.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor

from coin.coding.promise import answer_score
from coin.data.image_io import DAMAGE, to_square
from coin.errors import DataError, first_line
from coin.serving.front_end import Answer
from coin.serving.limits import Limits

ALL = "all"  # the model that answers for every task


class RefusedError(DataError):
    """A query is refused with this status of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class InferInput(BaseModel):
    """A request's input."""

    name: Literal["images"]
    datatype: Literal["BYTES"]
    shape: tuple[int]
    data: list[str]


class RequestedOutput(BaseModel):
    """An output that a request asks for."""

    name: str


class InferRequest(BaseModel):
    """A request; without `outputs` it asks for all of them."""

    id: str | None = None
    inputs: tuple[InferInput]
    outputs: list[RequestedOutput] = []


@dataclass(frozen=True)
class Description:
    """A description of the served system."""

    # The names of every task's classes, in the order of the experts.
    classes: Mapping[str, Sequence[str]]
    image_size: int  # the side of the networks' inputs
    platform: str  # the policy, the merge method and the decoder
    promise: Mapping[str, float] | None = (
        None  # `alpha` and `confidence`; None leaves out the output `accepted`
    )

    def outputs(self, model: str) -> list[dict[str, Any]]:
        """Return the names, types and shapes of a model's outputs."""
        kinds = {"probabilities": "FP32", "class": "INT64", "label": "BYTES", "score": "FP32"}
        if self.promise is not None:
            kinds["accepted"] = "BOOL"
        outputs = []
        for task in self._tasks(model):
            for name, kind in kinds.items():
                full_name = _full_name(model, task, name)
                shape = [-1]
                if name == "probabilities":
                    shape.append(len(self.classes[task]))
                outputs.append({"name": full_name, "datatype": kind, "shape": shape})
        return outputs

    def metadata(self, model: str) -> dict[str, Any]:
        """Return the protocol's model metadata; ``parameters`` holds the class names and the promise."""
        parameters = {}
        for task in self._tasks(model):
            parameters[f"{task}.classes"] = ",".join(self.classes[task])
        for name, value in (self.promise or {}).items():
            parameters[f"promise.{name}"] = str(value)
        return {
            "name": model,
            "versions": ["1"],
            "platform": self.platform,
            "parameters": parameters,
            "inputs": [{"name": "images", "datatype": "BYTES", "shape": [-1]}],
            "outputs": self.outputs(model),
        }

    def response(
        self, model: str, request: InferRequest, answers: Sequence[Answer], time: float
    ) -> dict[str, Any]:
        """Return the response to a request, after so many seconds."""
        requested = {output.name for output in request.outputs}
        offered = {output["name"]: output for output in self.outputs(model)}
        outputs = []
        for answer in answers:
            task = list(self.classes)[answer.expert]
            columns = _columns(self.classes[task], answer)
            for column, data in columns.items():
                name = _full_name(model, task, column)
                if name in offered and (not requested or name in requested):
                    samples = len(answer.reply.logits)
                    shape = [samples, *offered[name]["shape"][1:]]
                    own = {"shape": shape, "data": data, "parameters": _parameters([answer])}
                    outputs.append(offered[name] | own)
        response = {
            "model_name": model,
            "model_version": "1",
            "parameters": _parameters(answers) | {"seconds": time},
            "outputs": outputs,
        }
        return response if request.id is None else response | {"id": request.id}

    def _tasks(self, model: str) -> list[str]:
        return list(self.classes) if model == ALL else [model]


def _full_name(model: str, task: str, output: str) -> str:
    return f"{task}.{output}" if model == ALL else output


def _columns(classes: Sequence[str], answer: Answer) -> dict[str, list[Any]]:
    """Return the data of an answer's outputs, by name."""
    logits = answer.reply.logits[:, : len(classes)]  # [B, C] without what pads them
    predicted = logits.argmax(1).tolist()
    own = [True] * len(logits)  # a promise covers the expert's own answers
    accepted = answer.reply.accepted.tolist() if answer.decoded else own
    return {
        "probabilities": logits.softmax(1).flatten().tolist(),
        "class": predicted,
        "label": [classes[each] for each in predicted],
        "score": answer_score(logits).tolist(),
        "accepted": accepted,
    }


def _parameters(answers: Sequence[Answer]) -> dict[str, Any]:
    servers: list[str] = []
    for answer in answers:
        servers += answer.answered_by
    is_decoded = any(answer.decoded for answer in answers)
    return {"decoded": is_decoded, "answered_by": ",".join(dict.fromkeys(servers))}


def parse(
    body: bytes, model: str, about: Description, limits: Limits
) -> tuple[InferRequest, Tensor]:
    """Return a request for a model, and its images as `to_squares` makes them; else a DataError."""
    try:
        request = InferRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        message = f"found a request that is wrong at {where} ({first['msg']}), expected plain JSON (binary_data=False)"
        raise DataError(message) from error
    # Pydantic takes the last of keys that come twice.
    json.loads(body, object_pairs_hook=_refuse_duplicates)
    known = [output["name"] for output in about.outputs(model)]
    for output in request.outputs:
        if output.name not in known:
            raise DataError(f"found output '{output.name}', expected some of {', '.join(known)}")
    (given,) = request.inputs
    count = len(given.data)
    if given.shape != (count,) or count == 0:
        raise DataError(
            f"found {count} images for an input of shape {list(given.shape)}, expected one a row"
        )
    if count > limits.samples:
        raise RefusedError(
            f"found {count} images, expected at most {limits.samples}; send fewer at a time", 413
        )
    images = [open_file(text) for text in given.data]
    pixels = sum(image.width * image.height for image in images)
    if pixels > limits.pixels:
        raise RefusedError(
            f"found {pixels} pixels, expected at most {limits.pixels} a query; shrink the images",
            413,
        )
    return request, to_squares(images, about.image_size)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    """Raise DataError if two keys of a JSON object are the same."""
    keys = [key for key, _ in pairs]
    if len({*keys}) < len(keys):
        raise DataError(f"found a key twice among {', '.join(keys):.100}, expected each once")


def open_file(text: str) -> Image.Image:
    """Open a PNG or JPEG image in base64 without decoding it; raises `DataError` if it is none."""
    try:
        content = base64.b64decode(text, validate=True)
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
    except Image.DecompressionBombError as error:  # PIL's own limit, which is far above ours
        raise RefusedError(
            f"found an image that is too large ({first_line(error)}); shrink it", 413
        ) from error
    except DAMAGE as error:
        raise DataError("found no image, expected a PNG or JPEG file in base64") from error
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"found pixels of type {image.mode}, expected 8 bits a channel; convert the image first"
        )
    return image


def to_squares(images: Sequence[Image.Image], image_size: int) -> Tensor:
    """Return images prepared like a task's own, once for all servers: uint8 ``[B, 3, S, S]``, S the input size.

    Square images of one smaller size keep that size; others are centre-cropped. Raises `DataError` if one is damaged,
    or small ones differ in size.
    """
    squares = []
    try:
        for image in images:
            is_small = image.width == image.height <= image_size
            side = image.width if is_small else image_size
            squares.append(to_square(image, side))
    except DAMAGE as error:
        raise DataError(
            f"found a damaged image ({first_line(error)}), expected PNG or JPEG"
        ) from error
    shapes = {square.shape for square in squares}
    if len(shapes) > 1:
        raise DataError(
            f"found small images of different sizes, expected one; resize them to {image_size} pixels"
        )
    return torch.stack(squares)
