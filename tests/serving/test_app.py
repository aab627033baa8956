"""The application over real HTTP on loopback, with servers in this process instead of Ray's."""

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from coin.coding import Code
from coin.errors import ConfigurationError, OverloadedError
from coin.serving.front_end import FrontEnd, Limits
from coin.serving.policies import Policy, PolicyKind, StandIns
from coin.serving.protocol import Description, RefusedError
from coin.serving.servers import Reply, System, check_reply
from tests.serving.conftest import body, encoded

pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install '.[serve]'")
uvicorn = pytest.importorskip("uvicorn")

from coin.serving.app import Budget, make_app  # noqa: E402 (needs FastAPI)

CODE = Code([[0.5, 0.5]])
CLASSES = {"colours": ["red", "green", "blue"], "lights & darks": ["light", "dark"]}
NAMES = ("expert-colours", "expert-lights", "coded-0")


class Toy:
    """Two experts and an exact coded model for images of one colour, each of which can be told to fail."""

    def __init__(self, **limits: Any) -> None:
        self.ways = dict.fromkeys(NAMES, "")
        policy, stand_ins = Policy(PolicyKind.coded_hedged), StandIns("everyone", NAMES[:2], CODE)
        system = System({}, stand_ins, policy, {}, (3, 2), False)
        limits = {"initial_lateness": 30.0, "deadline": 60.0, "timeout": 60.0, "bytes": 5000, "samples": 4} | limits
        self.front = FrontEnd(
            {name: self._server(name) for name in NAMES}, stand_ins, policy, system.decode, Limits(**limits)
        )
        self.app = make_app(self.front, Description(CLASSES, 8, "coin (coded_hedged, average, linear)"))

    def _server(self, name: str) -> Any:
        async def answer(images: torch.Tensor) -> Reply:
            if self.ways[name] == "raise":
                raise RuntimeError("gone")
            if self.ways[name] == "hang":
                await asyncio.sleep(3600)
            colours = images.float().mean((2, 3)) / 255
            light = torch.stack([colours.mean(1) - 0.5, 0.5 - colours.mean(1), torch.zeros(len(images))], 1)
            outputs = dict(zip(NAMES, (colours, light, 0.5 * colours + 0.5 * light), strict=True))
            return check_reply(Reply(10 * outputs[name]), len(images), 3)

        return answer


@pytest.fixture
def serve_toy() -> Iterator[Any]:
    """Return a function that serves a toy in the background and returns it with a client and its port."""
    running = []

    def serve(**limits: Any) -> tuple[Toy, httpx.Client, int]:
        toy = Toy(**limits)
        bound = socket.create_server(("127.0.0.1", 0))  # handed over: a free port could be gone when it is asked for
        port = bound.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(toy.app, log_level="error", lifespan="on"))
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


def plain(*colour: int) -> np.ndarray:
    return np.tile(np.array(colour, np.uint8)[:, None, None], (1, 6, 6))


def png(*colour: int) -> str:
    return base64.b64encode(encoded(plain(*colour).transpose(1, 2, 0))).decode()


def files(*contents: str) -> dict[str, Any]:
    return body("BYTES", [len(contents)], list(contents))


def pixels(images: np.ndarray) -> dict[str, Any]:
    return body("UINT8", images.shape, images.flatten().tolist(), id="7")


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
    decoded, again = ask(client, "colours", pixels(plain(0, 200, 0)[None]))
    assert (decoded["parameters"]["decoded"], decoded["parameters"]["answered_by"]) == (True, "expert-lights,coded-0")
    assert decoded["id"] == "7"
    assert again["probabilities"] == pytest.approx(data["probabilities"], abs=1e-5)
    every, data = ask(client, "all", pixels(np.stack([plain(0, 0, 90), plain(90, 0, 0)])))
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
        'coin_answer_seconds_count{model="colours"} 1.0',
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


def wrong(**changes: Any) -> dict[str, Any]:
    return {"json": {"inputs": [{**pixels(plain(1, 2, 3)[None])["inputs"][0], **changes}]}}


INFER = "/v2/models/colours/infer"
MISTAKES = {
    "path": ("/nothing", wrong(), 404, "Not Found"),
    "method": ("/v2/health/live", wrong(), 405, "Method Not Allowed"),
    "model": ("/v2/models/magic/infer", wrong(), 404, "expected one of colours, lights & darks, all"),
    "datatype": (INFER, wrong(datatype="FP32"), 400, "inputs.0.datatype"),
    "too many": (INFER, {"json": files(*["aGVsbG8="] * 5)}, 413, "1 to 4 at a time"),
    "too large": (INFER, wrong(data=[0] * 9000), 413, "expected at most 5000"),
    "packed": (INFER, {"content": b"x", "headers": {"Content-Encoding": "gzip"}}, 415, "expected plain JSON"),
    "binary": (
        INFER, {"content": b"x", "headers": {"Inference-Header-Content-Length": "1"}}, 415, "set binary_data=False",
    ),
    "no length": (INFER, {"content": iter([b"{", b"}"])}, 411, "expected the number of bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_a_status_and_one_line(serve_toy: Any, case: str) -> None:
    path, request, status, message = MISTAKES[case]
    _, client, _ = serve_toy()
    found = client.post(path, **request)
    assert found.status_code == status
    assert message in found.text
    assert "\n" not in found.text


def half_sent(port: int, length: int = 1_000_000) -> socket.socket:
    """Begin an upload and send a hundred bytes of it."""
    connection = socket.create_connection(("127.0.0.1", port))
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + bytes(100))
    return connection


def test_a_client_that_still_sends_is_told_why_it_is_refused(serve_toy: Any) -> None:
    """A connection that is closed with half of the body on its way is reset, and the answer may be lost."""
    _, client, port = serve_toy(bytes=1000)
    with half_sent(port, 300_100) as connection:
        for _ in range(3):
            connection.sendall(bytes(100_000))
            time.sleep(0.3)
        connection.settimeout(5)
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 413")
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


def test_large_images_wait_in_a_line_of_their_own_and_are_refused_beyond_the_budget(serve_toy: Any) -> None:
    """Two queries of 64 blank images of 4096² held an ordinary one up for 15 s on two cores."""
    _, client, _ = serve_toy(bytes=2**23, samples=64)
    image, waited = base64.b64encode(encoded(np.zeros((4096, 4096), np.uint8))).decode(), []
    with ThreadPoolExecutor(8) as pool:
        bodies = [files(*[image] * count) for count in (64, 64, 4, 4, 4, 4, 2, 2)]
        works = [pool.submit(client.post, INFER, json=each) for each in bodies]
        while not all(work.done() for work in works):
            began = time.monotonic()
            ask(client, "colours", files(png(9, 0, 0)))
            waited.append(time.monotonic() - began)
    statuses = [work.result().status_code for work in works]
    assert all(("retry-after" in work.result().headers) == (work.result().status_code == 429) for work in works)
    assert statuses.count(413) == 2
    assert statuses.count(429) >= 2  # what is decoded at a time is bounded
    assert 200 in statuses
    assert max(waited) < 2
    metrics = client.get("/metrics").text
    assert f'coin_queries_total{{end="OverloadedError"}} {float(statuses.count(429))}' in metrics


def test_nobody_takes_more_than_half_of_what_the_others_leave() -> None:
    budget = Budget("bytes", 1000)
    with ExitStack() as stack:
        stack.enter_context(budget.taken(500))
        with pytest.raises(RefusedError, match="found 501 bytes, expected at most 500;"):
            stack.enter_context(budget.taken(501))
        with pytest.raises(OverloadedError, match="500 bytes of queries are being read already; ask again later"):
            stack.enter_context(budget.taken(251))
        stack.enter_context(budget.taken(250))
        stack.enter_context(budget.taken(60))  # there is something left for who needs little
        assert budget.held == 810
    assert budget.held == 0


def test_a_task_may_not_have_the_name_of_all() -> None:
    with pytest.raises(ConfigurationError, match="a task 'all'"):
        make_app(Toy().front, Description({"all": ["a"]}, 8, "coin"))


def test_tritons_client_asks_and_is_told_its_mistakes_in_json(serve_toy: Any) -> None:
    module = pytest.importorskip("tritonclient.http", reason="pip install 'tritonclient[http]'")
    toy, _, port = serve_toy()
    client, error = module.InferenceServerClient(f"127.0.0.1:{port}"), module.InferenceServerException

    def tensor(data: np.ndarray, datatype: str = "UINT8", name: str = "images", binary: bool = False) -> Any:
        made = module.InferInput(name, list(data.shape), datatype)
        made.set_data_from_numpy(data, binary_data=binary)
        return made

    image = plain(0, 200, 0)[None]
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["models"] == [*CLASSES, "all"]
    for model in ("colours", "lights & darks", "all"):
        assert client.is_model_ready(model)
        found, kinds = client.infer(model, [tensor(image)], request_id="x"), {"INT64": np.int64, "BYTES": np.object_}
        assert found.get_response()["id"] == "x"
        for output in client.get_model_metadata(model)["outputs"]:
            array = found.as_numpy(output["name"])
            assert array.dtype == kinds.get(output["datatype"], np.float32)
            assert array.shape == (1, *output["shape"][1:])
    toy.ways["expert-colours"] = "raise"
    file = tensor(np.array([png(0, 200, 0)], dtype=object), "BYTES")
    for given, binary in ((tensor(image), True), (file, False)):  # what is asked for as bytes comes as JSON
        asked = [module.InferRequestedOutput(name, binary_data=binary) for name in ("label", "class", "score")]
        found = client.infer("colours", [given], outputs=asked)
        assert [output["name"] for output in found.get_response()["outputs"]] == ["class", "label", "score"]
        assert found.get_response()["parameters"]["answered_by"] == "expert-lights,coded-0"
        assert (found.as_numpy("class").tolist(), found.as_numpy("label").tolist()) == ([1], ["green"])
    for options, message in (
        ({"inputs": [tensor(image, binary=True)]}, "expected plain JSON; set binary_data=False"),
        ({"inputs": [tensor(image)], "request_compression_algorithm": "gzip"}, "content-encoding: gzip"),
        ({"inputs": [tensor(image, name="pictures")]}, "expected 'images'"),
        ({"inputs": [tensor(image)], "outputs": [module.InferRequestedOutput("magic")]}, "found output 'magic'"),
    ):
        with pytest.raises(error, match=message):
            client.infer("colours", **options)
    with pytest.raises(error, match="found model 'magic'"):
        client.get_model_metadata("magic")
    client.close()
