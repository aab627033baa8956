"""The service and its client, over real HTTP on loopback, with servers in this process instead of Ray's."""

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from coin.coding import Code
from coin.errors import DeadlineError, LostError, OverloadedError, ServingError
from coin.serving.client import Client
from coin.serving.decodings import Decodings
from coin.serving.front_end import FrontEnd
from coin.serving.images import InputLimits
from coin.serving.limits import Limits
from coin.serving.policies import make_policy
from coin.serving.replies import Reply, ReplyFormat
from coin.serving.service import Description, Service

CODE = Code([[0.5, 0.5]])
CLASSES = {"colours": ["red", "green", "blue"], "lights & darks": ["light", "dark"]}


class Toy:
    """Two experts and an exact coded model for images of one colour, each of which can be told to fail."""

    def __init__(self, **limits: Any) -> None:
        self.ways = ["", "", ""]
        self.release = asyncio.Event()
        servers = [self._server(index) for index in range(3)]
        decodings = Decodings(CODE)
        policy = make_policy("coded_hedged")
        front = FrontEnd(
            servers, decodings.layout(), policy, ReplyFormat(3), decodings,
            Limits(**{"initial_lateness": 30.0, "deadline": 60.0, "timeout": 60.0, **limits}),
            ["expert-colours", "expert-lights", "coded-0"],
        )  # fmt: skip
        description = Description(CLASSES, 8, "average", "linear")
        self.service = Service(front, description, InputLimits(bytes=5000, pixels=1000, images=4))

    def _server(self, index: int) -> Any:
        async def answer(images: torch.Tensor) -> Reply:
            if self.ways[index] == "raise":
                raise RuntimeError("gone")
            if self.ways[index] == "hang":
                await self.release.wait()
            colours = images.float().mean((2, 3)) / 255
            light = torch.stack([colours.mean(1) - 0.5, 0.5 - colours.mean(1), torch.zeros(len(images))], 1)
            outputs = (colours, light, 0.5 * colours + 0.5 * light)
            return Reply(10 * outputs[index])

        return answer


@pytest.fixture
def serve_toy() -> Iterator[Any]:
    """Return a function that serves a toy in the background and returns it with its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers = []

    def serve(**limits: Any) -> tuple[Toy, str]:
        async def make() -> Toy:
            return Toy(**limits)

        toy = asyncio.run_coroutine_threadsafe(make(), loop).result()

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                async def body() -> AsyncIterator[bytes]:
                    left = int(self.headers.get("content-length", 0))
                    while left > 0:
                        part = self.rfile.read(min(left, 1000))
                        left -= len(part)
                        yield part

                headers = {name.lower(): value for name, value in self.headers.items()}
                future = toy.service.respond(self.command, unquote(self.path), headers, body())
                status, told = asyncio.run_coroutine_threadsafe(future, loop).result()
                content = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append((server, toy))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return toy, f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server, toy in servers:
        loop.call_soon_threadsafe(toy.release.set)
        server.shutdown()
        server.server_close()
        asyncio.run_coroutine_threadsafe(toy.service.front.stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def plain(*colour: int) -> np.ndarray:
    return np.tile(np.array(colour, np.uint8)[:, None, None], (1, 6, 6))


def png(*colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(plain(*colour).transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_own_and_decoded_answers(serve_toy: Any, tmp_path: Path) -> None:
    toy, url = serve_toy()
    client = Client(url)
    own = client.ask("colours", png(0, 200, 0))
    assert (own.task, own.decoded, own.answered_by) == ("colours", False, ("expert-colours",))
    (prediction,) = own.predictions
    assert (prediction.index, prediction.label) == (1, "green")
    assert len(prediction.probabilities) == 3
    assert sum(prediction.probabilities) == pytest.approx(1)
    toy.ways[0] = "raise"
    decoded = client.ask("colours", png(0, 200, 0))
    assert (decoded.decoded, decoded.answered_by) == (True, ("expert-lights", "coded-0"))
    assert decoded.predictions[0].label == "green"
    assert decoded.predictions[0].probabilities == pytest.approx(prediction.probabilities, abs=1e-5)
    path = tmp_path / "image.png"
    path.write_bytes(png(250, 250, 250))
    assert client.ask("lights & darks", path).predictions[0].label == "light"
    images = np.stack([plain(0, 0, 90), plain(90, 0, 0)])
    answers = client.ask_all(images)
    assert [answer.decoded for answer in answers] == [True, False]
    assert [each.label for each in answers[0].predictions] == ["blue", "red"]
    assert [len(each.probabilities) for each in answers[1].predictions] == [2, 2]


def test_description_and_health(serve_toy: Any) -> None:
    toy, url = serve_toy(failures=1)
    client = Client(url)
    told = client.tasks()
    assert told["tasks"] == CLASSES
    assert told["policy"] == "coded_hedged"
    assert client.health()["status"] == "ok"
    toy.ways[0] = "raise"
    client.ask("colours", png(9, 0, 0))
    health = client.health()
    assert health["servers"]["expert-colours"] == {"up": False, "requests": 0, "last_error": "RuntimeError: gone"}
    assert health["status"] == "ok"  # the others make up for it
    assert health["queries"] == {"answered": 1, "decoded": 1}
    toy.ways[2] = "raise"
    with pytest.raises(LostError, match="lost expert-colours, coded-0"):
        client.ask("colours", png(9, 0, 0))
    assert client.health()["status"] == "degraded"


def test_deadline_and_too_many_queries(serve_toy: Any) -> None:
    toy, url = serve_toy(deadline=0.4, queries=1)
    toy.ways = ["hang"] * 3
    client = Client(url)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            client.ask("colours", png(9, 0, 0))
        except ServingError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {type(error) for error in errors} == {DeadlineError, OverloadedError}


MISTAKES = {
    "path": ("GET", "/nothing", b"", 404, "/predict/TASK"),
    "deeper path": ("POST", "/predict/colours/1", b"", 404, "/predict/TASK"),
    "task": ("POST", "/predict/magic", b"", 404, "expected one of colours, lights & darks"),
    "verb": ("GET", "/predict/colours", b"", 405, "expected POST"),
    "other verb": ("PUT", "/health", b"", 405, "expected GET"),
    "no image": ("POST", "/predict/colours", b"hello", 400, "neither PNG nor JPEG"),
    "too large": ("POST", "/predict", bytes(5001), 413, "5000 bytes"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_a_status_and_one_line(serve_toy: Any, case: str) -> None:
    verb, path, body, status, message = MISTAKES[case]
    _, url = serve_toy()
    with pytest.raises(OSError, match=str(status)) as caught:
        urlopen(Request(url + path, body or None, method=verb))
    text = caught.value.read().decode()  # type: ignore[attr-defined]
    assert message in text
    assert "\n" not in text


def test_body_that_does_not_tell_its_length_is_not_read_beyond_the_limit(serve_toy: Any) -> None:
    toy, _ = serve_toy()
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1000
            yield bytes(1000)

    toy.service._started = True  # its front end is not needed
    status, told = asyncio.run(toy.service.respond("POST", "/predict/colours", {}, endless()))
    assert (status, told["kind"]) == (413, "TooLargeError")
    assert read == 6000


def test_client_without_a_server() -> None:
    with pytest.raises(ServingError, match="is coin serve running there"):
        Client("http://127.0.0.1:9", timeout=2).health()
