"""The Open Inference Protocol, version 2, in JSON over HTTP, as used by KServe, Triton and their clients.

A model is a task, or ``all`` for every task's answer to the same inputs. Its one input is ``images``: PNG or JPEG files
in base64 (BYTES, ``[B]``). Its outputs are ``probabilities`` FP32 ``[B, C]``, ``class`` INT64 ``[B]``, ``label`` BYTES
``[B]`` and ``score`` FP32 ``[B]``, one minus the largest probability, with the task before them and a dot where the
model is ``all``. Where the run holds a promise, ``accepted`` BOOL ``[B]`` says whether it covers the answer, as it does
an expert's own: accepted answers differ from the expert's with a probability of at most ``promise.alpha``, a parameter
of the model. The response's parameters, and each output's, say whether any of it was ``decoded`` and which servers it
was ``answered_by``; ``seconds`` is the time that these took.
"""

import io
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Base64Bytes, BaseModel, Field, ValidationError
from torch import Tensor

from coin.coding.promise import answer_score
from coin.data.image_io import DAMAGE, to_square
from coin.errors import DataError, first_line
from coin.serving.limits import Limits
from coin.serving.system import Answer, System

ALL = "all"  # the model that answers for every task

DATATYPES = {
    "probabilities": "FP32",
    "class": "INT64",
    "label": "BYTES",
    "score": "FP32",
    "accepted": "BOOL",
}


class RefusedError(DataError):
    """A query is refused with this status of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class InferInput(BaseModel, strict=True):
    """A request's input."""

    name: Literal["images"]
    datatype: Literal["BYTES"]
    shape: tuple[int]
    data: list[Base64Bytes]


class RequestedOutput(BaseModel, strict=True):
    """An output that a request asks for."""

    name: str


class InferRequest(BaseModel, strict=True):
    """A request; without `outputs` it asks for all of them."""

    id: str | None = None
    inputs: tuple[InferInput]
    # More than a model has, and few enough to look at.
    outputs: Annotated[list[RequestedOutput], Field(max_length=1000)] = []


def outputs(system: System, model: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Return a model's outputs: the task and what of it, with their names, types and shapes."""
    found = []
    for task in _tasks(system, model):
        for kind, datatype in DATATYPES.items():
            if kind == "accepted" and not system.promise:
                continue
            name = f"{task}.{kind}" if model == ALL else kind
            shape = [-1, len(system.classes[task])] if kind == "probabilities" else [-1]
            found.append((task, kind, {"name": name, "datatype": datatype, "shape": shape}))
    return found


def metadata(system: System, model: str) -> dict[str, Any]:
    """Return the protocol's model metadata; ``parameters`` holds the class names and the promise."""
    tasks = _tasks(system, model)
    parameters = {f"{task}.classes": ",".join(system.classes[task]) for task in tasks}
    if system.promise:
        parameters["promise.alpha"] = str(system.promise.alpha)
        parameters["promise.confidence"] = str(system.promise.confidence)
    return {
        "name": model,
        "versions": ["1"],
        "platform": f"coin ({system.stand_ins.policy}, {system.variant})",
        "parameters": parameters,
        "inputs": [{"name": "images", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [output for _, _, output in outputs(system, model)],
    }


def response(
    system: System, model: str, request: InferRequest, answers: Sequence[Answer], seconds: float
) -> dict[str, Any]:
    """Return the response to a request, whose answers took so many seconds, which it gives to a millisecond."""
    requested = {output.name for output in request.outputs}
    by_task = dict(zip(_tasks(system, model), answers, strict=True))
    data = {task: _data(system.classes[task], answer) for task, answer in by_task.items()}
    found = []
    for task, kind, output in outputs(system, model):
        if not requested or output["name"] in requested:
            shape = [len(by_task[task].logits), *output["shape"][1:]]
            parameters = _parameters([by_task[task]])
            own = {"shape": shape, "data": data[task][kind], "parameters": parameters}
            found.append(output | own)
    named = {"model_name": model, "model_version": "1"}
    if request.id is not None:
        named["id"] = request.id
    of_all = _parameters(answers) | {"seconds": round(seconds, 3)}
    return named | {"parameters": of_all, "outputs": found}


def _tasks(system: System, model: str) -> list[str]:
    return list(system.classes) if model == ALL else [model]


def _data(classes: Sequence[str], answer: Answer) -> dict[str, list[Any]]:
    """Return the data of an answer's outputs, by name."""
    logits = answer.logits[:, : len(classes)]  # [B, C] without what pads them
    predicted = logits.argmax(1).tolist()
    accepted = [True] * len(logits)  # a promise covers the expert's own answers
    if answer.accepted is not None:
        accepted = answer.accepted.tolist()
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


def parse(body: bytes, model: str, system: System, limits: Limits) -> tuple[InferRequest, Tensor]:
    """Return a request for a model, and its images as `read_images` does; else a DataError."""
    try:
        request = InferRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        message = f"found a request that is wrong at {where} ({first['msg']}), expected plain JSON (binary_data=False)"
        raise DataError(message) from error
    known = [output["name"] for _, _, output in outputs(system, model)]
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
    return request, read_images(given.data, system.image_size, limits.pixels)


def read_images(files: Sequence[bytes], image_size: int, most_pixels: int = 2**24) -> Tensor:
    """Return images prepared like a task's own, once for all servers: uint8 ``[B, 3, S, S]``, S the input size.

    Square images of one smaller size keep that size; others are centre-cropped. Raises `DataError` if a file is no PNG
    or JPEG image of 8 bits a channel, is damaged, all have too many pixels, or small ones differ in size.
    """
    try:
        images = [Image.open(io.BytesIO(file), formats=("PNG", "JPEG")) for file in files]
        pixels = sum(image.width * image.height for image in images)
        if pixels > most_pixels:
            raise RefusedError(
                f"found {pixels} pixels, expected at most {most_pixels} a query; shrink the images",
                413,
            )
        squares = [_square(image, image_size) for image in images]
    except DataError:  # which is a ValueError
        raise
    except DAMAGE as error:
        reason = first_line(error)
        raise DataError(
            f"found no whole image ({reason}), expected PNG or JPEG files in base64"
        ) from error
    if len({square.shape for square in squares}) > 1:
        raise DataError(
            f"found small images of different sizes, expected one; resize them to {image_size} pixels"
        )
    return torch.stack(squares)


def _square(image: Image.Image, image_size: int) -> Tensor:
    """Return an image as `read_images` does, decoded."""
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"found pixels of type {image.mode}, expected 8 bits a channel; convert the image first"
        )
    is_small = image.width == image.height <= image_size
    return to_square(image, image.width if is_small else image_size)
