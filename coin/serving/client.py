"""A client of `coin serve`: images in, predictions out. It needs nothing but the standard library and NumPy."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray

from coin import errors
from coin.errors import ServingError

Images = bytes | Path | NDArray[np.uint8]
"""A PNG or JPEG file, or its contents, or an array: uint8 ``[H, W]``, ``[1 or 3, H, W]`` or ``[B, 1 or 3, H, W]``."""


@dataclass(frozen=True)
class Prediction:
    """What one image is taken for.

    Attributes:
        index: The class.
        label: Its name.
        probabilities: Of all classes.
    """

    index: int
    label: str
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class TaskAnswer:
    """One task's answer.

    Attributes:
        task: The task.
        decoded: Whether it was decoded from other servers' answers.
        answered_by: The servers whose answers it is, or was decoded from.
        seconds: What the front end took.
        predictions: One for every image.
    """

    task: str
    decoded: bool
    answered_by: tuple[str, ...]
    seconds: float
    predictions: tuple[Prediction, ...]


class Client:
    """Asks a served experiment.

    Args:
        url: Where it is served.
        timeout: Seconds to wait for an answer.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", timeout: float = 30.0) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout

    def ask(self, task: str, images: Images) -> TaskAnswer:
        """Return one task's answer.

        Raises:
            ServingError: There is none; the message is the server's, and so is the class where it is one of ours.
        """
        return _answer(self._call(f"/predict/{quote(task, safe='')}", images))

    def ask_all(self, images: Images) -> list[TaskAnswer]:
        """Return every task's answer; see `ask`."""
        return [_answer(told) for told in self._call("/predict", images)["answers"]]

    def tasks(self) -> dict[str, Any]:
        """Return what is served."""
        return self._call("/tasks")

    def health(self) -> dict[str, Any]:
        """Return who is up, and what became of the queries so far."""
        return self._call("/health")

    def _call(self, path: str, images: Images | None = None) -> dict[str, Any]:
        body, headers = (None, {}) if images is None else _encoded(images)
        request = Request(self.url + path, body, headers)
        try:
            with urlopen(request, timeout=self.timeout) as response:
                told: dict[str, Any] = json.load(response)
                return told
        except HTTPError as error:
            raise _told_error(error) from None
        except (URLError, OSError, ValueError) as error:
            raise ServingError(f"no answer from {self.url} ({error}); is coin serve running there?") from error


def _encoded(images: Images) -> tuple[bytes, dict[str, str]]:
    if isinstance(images, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, images, allow_pickle=False)
        return buffer.getvalue(), {"Content-Type": "application/x-npy"}
    content = images.read_bytes() if isinstance(images, Path) else images
    return content, {"Content-Type": "application/octet-stream"}


def _told_error(error: HTTPError) -> errors.CoinError:
    """Return the server's own error where it tells one."""
    try:
        told = json.loads(error.read())
        message, kind = str(told["error"]), getattr(errors, str(told["kind"]), ServingError)
    except (OSError, ValueError, KeyError, TypeError):
        return ServingError(f"found status {error.code} and no message")
    is_ours = isinstance(kind, type) and issubclass(kind, ServingError)
    found: errors.CoinError = (kind if is_ours else ServingError)(message)
    return found


def _answer(told: dict[str, Any]) -> TaskAnswer:
    predictions = tuple(
        Prediction(each["class"], each["label"], tuple(each["probabilities"])) for each in told["predictions"]
    )
    return TaskAnswer(told["task"], told["decoded"], tuple(told["answered_by"]), told["seconds"], predictions)
