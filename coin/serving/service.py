"""The service behind HTTP: paths, bodies and errors, without a web framework."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coin.errors import CoinError, ConfigurationError, DataError, DeadlineError, ServingError
from coin.serving.front_end import FrontEnd
from coin.serving.images import InputLimits, TooLargeError, read_images
from coin.serving.replies import Answer


@dataclass(frozen=True)
class Description:
    """What is served.

    Args:
        classes: The names of every task's classes, in the order of the experts.
        image_size: The side of the networks' inputs, in pixels.
        method: The merge method of the coded models.
        decoder: The decoder.
    """

    classes: Mapping[str, Sequence[str]]
    image_size: int
    method: str
    decoder: str


class Service:
    """Answers requests: ``POST /predict/TASK``, ``POST /predict`` for all tasks, ``GET /tasks`` and ``GET /health``.

    The body of a prediction is one image or an array of images (`coin.serving.images.read_images`). What comes back is
    JSON: for each task the task, whether the answer was ``decoded``, who it was ``answered_by``, and for each image its
    class, the class's label and the probabilities, the softmax of the logits. An error is one line under ``error``,
    and the name of its class under ``kind``.

    Args:
        front: The front end; it is started with the first request.
        description: What is served.
        limits: What a query may bring.
    """

    def __init__(self, front: FrontEnd, description: Description, limits: InputLimits) -> None:
        self.front = front
        self.description = description
        self.limits = limits
        self.tasks = tuple(description.classes)
        self._started = False

    async def respond(
        self, verb: str, path: str, headers: Mapping[str, str], body: AsyncIterator[bytes]
    ) -> tuple[int, dict[str, Any]]:
        """Return the status and the JSON object that answer a request.

        Args:
            verb: ``GET`` or ``POST``.
            path: Such as ``/predict/mnist``.
            headers: By lower-case name.
            body: In parts; no more than the limit is read.
        """
        if not self._started:
            self._started = True
            self.front.start()
        try:
            return 200, await self._respond(verb, path, headers, body)
        except _HttpError as error:
            return error.status, {"error": str(error), "kind": "ServingError"}
        except CoinError as error:
            status = next(status for kind, status in _STATUS if isinstance(error, kind))
            return status, {"error": " ".join(str(error).split()), "kind": type(error).__name__}

    async def _respond(
        self, verb: str, path: str, headers: Mapping[str, str], body: AsyncIterator[bytes]
    ) -> dict[str, Any]:
        parts = [part for part in path.split("/") if part]
        known = {"predict": "POST", "tasks": "GET", "health": "GET"}
        if not parts or parts[0] not in known or len(parts) > (2 if parts[0] == "predict" else 1):
            raise _HttpError(404, f"found path '{path}', expected /predict, /predict/TASK, /tasks or /health")
        if verb != known[parts[0]]:
            raise _HttpError(405, f"found {verb} {path}, expected {known[parts[0]]}")
        if parts[0] == "tasks":
            return self.describe()
        if parts[0] == "health":
            return self.health()
        if len(parts) == 2 and parts[1] not in self.tasks:
            raise _HttpError(404, f"found task '{parts[1]}', expected one of {', '.join(self.tasks)}")
        content = await self._read(headers, body)
        kind, size = headers.get("content-type", ""), self.description.image_size
        # Decoding an image takes long enough to hold everybody else up.
        images = await asyncio.to_thread(read_images, content, kind, size, self.limits)
        if len(parts) == 2:
            return self._told(await self.front.ask(images, self.tasks.index(parts[1])))
        return {"answers": [self._told(answer) for answer in await self.front.ask_all(images)]}

    async def _read(self, headers: Mapping[str, str], body: AsyncIterator[bytes]) -> bytes:
        told = headers.get("content-length", "0")
        read = bytearray()
        if told.isdecimal() and int(told) <= self.limits.bytes:
            async for part in body:
                read += part
                if len(read) > self.limits.bytes:
                    break
            else:
                return bytes(read)
        raise TooLargeError(f"found a body of more than {self.limits.bytes} bytes; send fewer or smaller images")

    def describe(self) -> dict[str, Any]:
        """Return what is served."""
        return {
            "tasks": {task: list(names) for task, names in self.description.classes.items()},
            "image_size": self.description.image_size,
            "method": self.description.method,
            "decoder": self.description.decoder,
            "policy": str(self.front.policy.kind),
            "quantile": self.front.policy.quantile,
            "servers": list(self.front.names),
        }

    def health(self) -> dict[str, Any]:
        """Return who is believed to be up, and what became of the queries so far."""
        queues = self.front.queues
        servers = {
            queue.name: {"up": not queue.breaker.is_down, "requests": len(queue), "last_error": queue.last_error}
            for queue in queues
        }
        up = sum(1 << place for place, queue in enumerate(queues) if not queue.breaker.is_down)
        answerable = self.front.layout.covers(up, self.front.layout.every_expert)
        return {
            "status": "ok" if answerable else "degraded",
            "servers": servers,
            "queries": dict(self.front.counts),
            "late_after_seconds": self.front.lateness.seconds,
        }

    def _told(self, answer: Answer) -> dict[str, Any]:
        task = self.tasks[answer.expert]
        names = self.description.classes[task]
        probabilities = answer.logits[:, : len(names)].softmax(1)
        return {
            "task": task,
            "decoded": answer.decoded,
            "answered_by": list(answer.answered_by),
            "seconds": answer.seconds,
            "predictions": [
                {"class": index, "label": names[index], "probabilities": row}
                for index, row in zip(probabilities.argmax(1).tolist(), probabilities.tolist(), strict=True)
            ],
        }


class _HttpError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


_STATUS: tuple[tuple[type[CoinError], int], ...] = (
    (TooLargeError, 413),
    (DataError, 400),
    (ConfigurationError, 400),
    (DeadlineError, 504),
    (ServingError, 503),
    (CoinError, 500),
)
