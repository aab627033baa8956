"""The application over real HTTP on loopback, with servers in this process instead of Ray's."""

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from coin.coding import Code
from coin.errors import ConfigurationError
from coin.serving.front_end import FrontEnd
from coin.serving.limits import Limits
from coin.serving.policies import PolicyKind, StandIns
from coin.serving.servers import Reply
from coin.serving.system import System
from tests.serving.conftest import body, encoded

pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install '.[serve]'")
uvicorn = pytest.importorskip("uvicorn")

from coin.serving.app import make_app  # noqa: E402 (needs FastAPI)

CODE = Code([[0.5, 0.5]])
CLASSES = {"colours": ["red", "green", "blue"], "lights & darks": ["light", "dark"]}
NAMES = ("expert-colours", "expert-lights", "coded-0")


class Toy:
    """Two experts and an exact coded model for images of one colour, each of which can be told to fail."""

    def __init__(self, **limits: Any) -> None:
        self.ways = dict.fromkeys(NAMES, "")
        stand_ins = StandIns(PolicyKind.coded_hedged, NAMES[:2], CODE)
        system = System(CLASSES, {}, stand_ins, {}, False, image_size=8)
        limits = {"initial_lateness": 30.0, "deadline": 60.0, "timeout": 60.0, "bytes": 5000, "samples": 4} | limits
        self.front = FrontEnd(system, {name: self._server(name) for name in NAMES}, Limits(**limits))
        self.app = make_app(self.front)

    def _server(self, name: str) -> Any:
        async def answer(expert: int, images: torch.Tensor) -> Reply:
            if self.ways[name] == "raise":
                raise RuntimeError("gone")
            if self.ways[name] == "hang":
                await asyncio.sleep(3600)
            colours = images.float().mean((2, 3)) / 255
            light = torch.stack([colours.mean(1) - 0.5, 0.5 - colours.mean(1), torch.zeros(len(images))], 1)
            outputs = dict(zip(NAMES, (colours, light, 0.5 * colours + 0.5 * light), strict=True))
            return Reply(10 * outputs[name], outputs[name][:, :0])

        return answer


@pytest.fixture
def serve_toy() -> Iterator[Any]:
    """Return a function that serves a toy in the background and returns it with a client and its port."""
    running = []

    def serve(http: Any = "auto", **limits: Any) -> tuple[Toy, httpx.Client, int]:
        toy = Toy(**limits)
        bound = socket.create_server(("127.0.0.1", 0))  # handed over: a free port could be gone when it is asked for
        port = bound.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(toy.app, log_level="error", lifespan="on", http=http))
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        running.append((server, thread, client))
        while not server.started:
            assert thread.is_alive(), "the server ended before it began"
            time.sleep(0.01)
        return toy, client, port

    yield serve
    for server, thread, client in running:
        client.close()
        server.should_exit = server.force_exit = True
        thread.join(20)
        assert not thread.is_alive()


def png(*colour: int) -> str:
    """Return an image of one colour."""
    return base64.b64encode(encoded(np.tile(np.array(colour, np.uint8), (6, 6, 1)))).decode()


def files(*contents: str, **more: Any) -> dict[str, Any]:
    return body(list(contents), **more)


def ask(client: httpx.Client, model: str, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the response and the data of its outputs by name."""
    found = client.post(f"/v2/models/{model}/infer", json=body)
    assert found.status_code == 200, found.text
    return found.json(), {output["name"]: output["data"] for output in found.json()["outputs"]}


def test_own_and_decoded_answers(serve_toy: Any) -> None:
    toy, client, _ = serve_toy()
    own, data = ask(client, "colours", files(png(0, 200, 0)))
    assert (own["parameters"]["decoded"], own["parameters"]["answered_by"]) == (False, "expert-colours")
    assert (data["class"], data["label"]) == ([1], ["green"])
    assert sum(data["probabilities"]) == pytest.approx(1)
    assert data["score"] == pytest.approx([1 - max(data["probabilities"])], abs=1e-6)  # which are in float32
    toy.ways["expert-colours"] = "raise"
    decoded, again = ask(client, "colours", files(png(0, 200, 0), id="7"))
    assert (decoded["parameters"]["decoded"], decoded["parameters"]["answered_by"]) == (True, "expert-lights,coded-0")
    assert decoded["id"] == "7"
    assert again["probabilities"] == pytest.approx(data["probabilities"], abs=1e-5)
    every, data = ask(client, "all", files(png(0, 0, 90), png(90, 0, 0)))
    assert data["colours.label"] == ["blue", "red"]
    said = {output["name"]: output["parameters"]["decoded"] for output in every["outputs"]}
    assert (said["colours.class"], said["lights & darks.class"]) == (True, False)
    shapes = {output["name"]: output["shape"] for output in every["outputs"]}
    assert shapes["lights & darks.probabilities"] == [2, 2]


def test_readiness_metrics_and_description(serve_toy: Any) -> None:
    toy, client, _ = serve_toy()
    assert client.get("/v2/health/live").status_code == client.get("/v2/health/ready").status_code == 200
    metadata = client.get("/v2/models/colours").json()
    assert metadata["parameters"] == {"colours.classes": "red,green,blue"}
    assert {output["name"] for output in metadata["outputs"]} == {"probabilities", "class", "label", "score"}
    assert client.get("/v2/models/magic").status_code == 404
    toy.ways["expert-colours"] = "raise"
    ask(client, "colours", files(png(9, 0, 0)))
    assert client.get("/v2/health/ready").status_code == 200  # the others make up for it
    toy.ways["coded-0"] = "raise"
    lost = client.post("/v2/models/colours/infer", json=files(png(9, 0, 0)))
    assert (lost.status_code, lost.json()["kind"], lost.headers["retry-after"]) == (503, "LostError", "1")
    assert client.get("/v2/health/ready").status_code == 503
    assert client.get("/v2/models/colours/ready").status_code == 503
    assert client.get("/v2/models/lights & darks/ready").status_code == 200
    metrics = client.get("/metrics").text
    for line in (
        'coin_queries_total{end="LostError"} 1.0', 'coin_queries_total{end="decoded"} 1.0',
        'coin_server_up{server="coded-0"} 0.0', 'coin_server_up{server="expert-lights"} 1.0',
    ):  # fmt: skip
        assert line in metrics
    toy.ways = dict.fromkeys(NAMES, "")
    ask(client, "colours", files(png(9, 0, 0)))
    assert client.get("/v2/models/colours/ready").status_code == 200
    assert "/v2/models/{model}/infer" in client.get("/openapi.json").json()["paths"]


def test_deadline_and_too_many_queries(serve_toy: Any) -> None:
    toy, client, _ = serve_toy(deadline=0.4, queries=1)
    toy.ways = dict.fromkeys(NAMES, "hang")
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: client.post("/v2/models/colours/infer", json=files(png(9, 0, 0))), range(2)))
    kinds = {(each.status_code, each.json()["kind"], each.headers["retry-after"]) for each in found}
    assert kinds == {(504, "DeadlineError", "1"), (429, "OverloadedError", "1")}


INFER = "/v2/models/colours/infer"
GOOD = {"json": files(png(1, 2, 3))}
MISTAKES = {
    "path": ("/nothing", GOOD, 404, "Not Found"),
    "method": ("/v2/health/live", GOOD, 405, "Method Not Allowed"),
    "model": ("/v2/models/magic/infer", GOOD, 404, "expected one of colours, lights & darks, all"),
    "no image": (INFER, {"json": files("aGVsbG8=")}, 400, "found no whole image"),
    "too many": (INFER, {"json": files(*["aGVsbG8="] * 5)}, 413, "at most 4"),
    "too large": (INFER, {"json": files("A" * 9000)}, 413, "expected at most 5000"),
    "no length": (INFER, {"content": iter([b"{", b"}"])}, 400, "wrong at inputs"),
    "binary": (
        INFER,
        {"content": json.dumps(GOOD["json"]).encode() + b"...", "headers": {"Inference-Header-Content-Length": "9"}},
        400,
        "expected plain JSON",
    ),
    "packed": (INFER, {"content": b"\x1f\x8b", "headers": {"Content-Encoding": "gzip"}}, 400, "expected plain JSON"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_a_status_and_one_line(serve_toy: Any, case: str) -> None:
    path, request, status, message = MISTAKES[case]
    _, client, _ = serve_toy()
    found = client.post(path, **request)
    assert found.status_code == status
    assert message in found.text
    assert "\n" not in found.text


def test_a_request_that_says_it_is_json_to_its_end_is_answered(serve_toy: Any) -> None:
    _, client, _ = serve_toy()
    content = json.dumps(GOOD["json"]).encode()
    found = client.post(INFER, content=content, headers={"Inference-Header-Content-Length": str(len(content))})
    assert found.status_code == 200


def half_sent(port: int, length: int = 1_000_000) -> socket.socket:
    """Begin an upload and send a hundred bytes of it."""
    connection = socket.create_connection(("127.0.0.1", port))
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + bytes(100))
    return connection


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize(("limits", "status"), [({"bytes": 1000}, 413), ({"queries": 1}, 429)])
def test_a_client_that_still_sends_is_told_why_it_is_refused(
    serve_toy: Any, http: str, limits: dict[str, Any], status: int
) -> None:
    """A connection that is closed with half of the body on its way is reset, and the answer may be lost."""
    toy, client, port = serve_toy(http, **limits)
    toy.front._running = limits.get("queries", 0)
    with half_sent(port, 300_100) as connection:
        for _ in range(3):
            connection.sendall(bytes(100_000))
            time.sleep(0.3)
        connection.settimeout(5)
        assert connection.recv(100).startswith(f"HTTP/1.1 {status}".encode())
    assert client.get("/v2/health/live").status_code == 200


def test_half_sent_bodies_hold_nobody_up_and_end(serve_toy: Any) -> None:
    _, client, port = serve_toy(bytes=2_000_000, reading=1.5, queries=16)
    slow = [half_sent(port) for _ in range(14)]
    time.sleep(0.3)
    began = time.monotonic()
    ask(client, "colours", files(png(9, 0, 0)))
    assert time.monotonic() - began < 1.0
    slow += [half_sent(port) for _ in range(2)]
    time.sleep(0.2)
    assert client.post(INFER, json=files(png(9, 0, 0))).status_code == 429  # and not for ever
    for connection in slow:
        connection.settimeout(5)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        connection.close()
    ask(client, "colours", files(png(9, 0, 0)))


def test_the_deadline_begins_before_the_body_is_read(serve_toy: Any) -> None:
    toy, _, port = serve_toy(deadline=1.5)
    toy.ways = dict.fromkeys(NAMES, "hang")
    content = json.dumps(files(png(9, 0, 0))).encode()
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content[:50])
        time.sleep(1.0)
        connection.sendall(content[50:])
        assert connection.recv(100).startswith(b"HTTP/1.1 504")
    assert time.monotonic() - began < 2.3


def test_large_images_do_not_hold_small_ones_up(serve_toy: Any) -> None:
    _, client, _ = serve_toy(bytes=2**23, samples=64)
    image = base64.b64encode(encoded(np.zeros((4096, 4096), np.uint8))).decode()
    waited = []
    with ThreadPoolExecutor(8) as pool:
        bodies = [files(*[image] * count) for count in (64, 2, 1, 1, 1, 1)]
        works = [pool.submit(client.post, INFER, json=each) for each in bodies]
        while not all(work.done() for work in works):
            began = time.monotonic()
            ask(client, "colours", files(png(9, 0, 0)))
            waited.append(time.monotonic() - began)
    assert [work.result().status_code for work in works] == [413, 413, 200, 200, 200, 200]
    assert max(waited) < 2


def test_a_task_may_not_have_the_name_of_all() -> None:
    toy = Toy()
    toy.front.system = replace(toy.front.system, classes={"all": ["a"], "b": ["c"]})
    with pytest.raises(ConfigurationError, match="a task 'all'"):
        make_app(toy.front)


def test_tritons_client_asks_and_is_told_its_mistakes_in_json(serve_toy: Any) -> None:
    module = pytest.importorskip("tritonclient.http", reason="pip install 'tritonclient[http]'")
    toy, _, port = serve_toy()
    client, error = module.InferenceServerClient(f"127.0.0.1:{port}"), module.InferenceServerException

    def tensor(name: str = "images", binary: bool = False) -> Any:
        made = module.InferInput(name, [1], "BYTES")
        made.set_data_from_numpy(np.array([png(0, 200, 0)], dtype=object), binary_data=binary)
        return made

    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["models"] == [*CLASSES, "all"]
    for model in ("colours", "lights & darks", "all"):
        assert client.is_model_ready(model)
        found, kinds = client.infer(model, [tensor()], request_id="x"), {"INT64": np.int64, "BYTES": np.object_}
        assert found.get_response()["id"] == "x"
        for output in client.get_model_metadata(model)["outputs"]:
            array = found.as_numpy(output["name"])
            assert array.dtype == kinds.get(output["datatype"], np.float32)
            assert array.shape == (1, *output["shape"][1:])
    toy.ways["expert-colours"] = "raise"
    for binary in (True, False):  # what is asked for as bytes comes as JSON
        asked = [module.InferRequestedOutput(name, binary_data=binary) for name in ("label", "class", "score")]
        found = client.infer("colours", [tensor()], outputs=asked)
        assert [output["name"] for output in found.get_response()["outputs"]] == ["class", "label", "score"]
        assert found.get_response()["parameters"]["answered_by"] == "expert-lights,coded-0"
        assert (found.as_numpy("class").tolist(), found.as_numpy("label").tolist()) == ([1], ["green"])
    for options, message in (
        ({"inputs": [tensor(binary=True)]}, r"expected plain JSON \(binary_data=False\)"),
        ({"inputs": [tensor()], "request_compression_algorithm": "gzip"}, "expected plain JSON"),
        ({"inputs": [tensor("pictures")]}, "should be 'images'"),
        ({"inputs": [tensor()], "outputs": [module.InferRequestedOutput("magic")]}, "found output 'magic'"),
    ):
        with pytest.raises(error, match=message):
            client.infer("colours", **options)
    with pytest.raises(error, match="found model 'magic'"):
        client.get_model_metadata("magic")
    client.close()
