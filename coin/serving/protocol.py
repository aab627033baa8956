"""The Open Inference Protocol, version 2, over HTTP, as used by KServe, Triton and their clients.

A model is a task, or ``all`` for every task's answer to the same inputs. Its one input is ``images``, as pixels (UINT8,
``[B, 1 or 3, H, W]``) or as PNG or JPEG files (BYTES, in base64 where they are JSON), or ``texts`` (BYTES). Its outputs
are ``probabilities`` FP32 ``[B, C]``, ``class`` INT64 ``[B]``, ``label`` BYTES ``[B]`` and ``risk`` FP32 ``[B]``, with
the task before them and a dot where the model is ``all``. The risk is the estimated probability that the expert's own
answer would have been another class, for inputs of its task: 0 for an expert's own answer, 1 where it is not known.
Where the run holds a promise, ``accepted`` BOOL ``[B]`` says whether it covers the answer, and the model's parameters
say what it promises: accepted answers differ from the expert's with a probability of at most ``promise.alpha``. The
response's parameters say whether any of it was ``decoded``, which servers it was ``answered_by``, and the ``seconds``
that the front end took; each output's say so of its own task. Inputs and outputs may come in the binary extension, a
request packed by gzip or deflate.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coin.serving.replies import Answer

ALL = "all"
"""The model that answers for every task."""

VERSION = "1"
"""Of every model."""


@dataclass(frozen=True)
class Description:
    """A description of the served system.

    Args:
        classes: The names of every task's classes, in the order of the experts.
        image_size: The side of the networks' inputs in pixels, or the number of their tokens.
        platform: The policy and, with coded models, the merge method and decoder.
        reads: ``images`` or ``texts``.
        tokenizer: The ``tokenizer.json`` for texts; None is the packaged encoder's.
        promise: ``alpha`` and ``confidence`` of the run's promise; None leaves out the output ``accepted``.
    """

    classes: Mapping[str, Sequence[str]]
    image_size: int
    platform: str
    reads: str = "images"
    tokenizer: str | None = None
    promise: Mapping[str, float] | None = None

    def tasks(self, model: str) -> list[str]:
        """Return the tasks of a model."""
        return list(self.classes) if model == ALL else [model]

    def outputs(self, model: str, task: str) -> list[dict[str, Any]]:
        """Return the names, types and shapes of a model's outputs for a task."""
        prefix, classes = f"{task}." if model == ALL else "", len(self.classes[task])
        kinds = {"probabilities": "FP32", "class": "INT64", "label": "BYTES", "risk": "FP32"}
        kinds |= {} if self.promise is None else {"accepted": "BOOL"}
        return [
            {"name": prefix + name, "datatype": kind, "shape": [-1, classes] if name == "probabilities" else [-1]}
            for name, kind in kinds.items()
        ]

    def metadata(self, model: str) -> dict[str, Any]:
        """Return the protocol's model metadata; ``parameters`` holds the class names."""
        is_image = self.reads == "images"
        shape, datatype = ([-1, 3, self.image_size, self.image_size], "UINT8") if is_image else ([-1], "BYTES")
        return {
            "name": model,
            "versions": [VERSION],
            "platform": self.platform,
            "inputs": [{"name": self.reads, "datatype": datatype, "shape": shape}],
            "outputs": [output for task in self.tasks(model) for output in self.outputs(model, task)],
            "parameters": {f"{task}.classes": ",".join(self.classes[task]) for task in self.tasks(model)}
            | {f"promise.{name}": str(value) for name, value in (self.promise or {}).items()},
        }


def response(
    model: str, identity: str | None, asked: Mapping[str, bool], answers: Sequence[Answer], about: Description
) -> tuple[dict[str, Any], bytes]:
    """Return the response to a request of that id, and the bytes of its binary outputs, which follow its JSON.

    `asked` maps the requested outputs to whether they are binary.
    """
    tasks, outputs, binary = list(about.classes), [], []
    for answer in answers:
        task = tasks[answer.expert]
        probabilities = answer.logits[:, : len(about.classes[task])].softmax(1)
        classes = probabilities.argmax(1)
        labels = np.array([about.classes[task][index] for index in classes.tolist()], dtype=object)
        risk = answer.risk.nan_to_num(1.0).float()
        arrays = (probabilities.float().numpy(), classes.numpy(), labels, risk.numpy(), answer.accepted.numpy())
        for output, array in zip(about.outputs(model, task), arrays, strict=False):  # the last one where promised
            if output["name"] not in asked:
                continue
            told = {**output, "shape": list(array.shape), "parameters": _parameters([answer])}
            if asked[output["name"]]:
                binary.append(_packed(array))
                told["parameters"]["binary_data_size"] = len(binary[-1])
            else:
                told["data"] = array.flatten().tolist()
            outputs.append(told)
    told = {"model_name": model, "model_version": VERSION, "parameters": _parameters(answers), "outputs": outputs}
    return told if identity is None else {**told, "id": identity}, b"".join(binary)


def _packed(array: NDArray[Any]) -> bytes:
    if array.dtype != object:
        return array.tobytes()
    return b"".join(struct.pack("<I", len(item)) + item for item in (str(each).encode() for each in array))


def _parameters(answers: Sequence[Answer]) -> dict[str, Any]:
    by = dict.fromkeys(name for answer in answers for name in answer.answered_by)
    decoded = any(answer.decoded for answer in answers)
    return {"decoded": decoded, "answered_by": ",".join(by), "seconds": max(answer.seconds for answer in answers)}
