"""The application over real HTTP on loopback, with servers in this process instead of Ray's."""

import asyncio
import base64
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

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

CLASSES = {"colours": ["red", "green", "blue"], "lights & darks": ["light", "dark"]}
EXPERTS = ["expert-colours", "expert-lights"]
STAND_INS = StandIns(PolicyKind.coded_hedged, EXPERTS, Code([[0.5, 0.5]]))
SYSTEM = System(CLASSES, {}, STAND_INS, {}, False, image_size=8)
LIMITS = {"initial_lateness": 30.0, "deadline": 60.0, "timeout": 60.0, "bytes": 5000, "samples": 4}


class Toy:
    """Two experts and an exact coded model for images of one colour; `ways` says which of them raise or hang."""

    def __init__(self, http="auto", **limits):
        self.ways = {}
        servers = {name: partial(self.answer, name) for name in STAND_INS.servers}
        app = make_app(FrontEnd(SYSTEM, servers, Limits(**LIMITS | limits)))
        bound = socket.create_server(("127.0.0.1", 0))  # handed over: a free port could be gone
        self.port = bound.getsockname()[1]
        config = uvicorn.Config(app, log_level="error", lifespan="on", http=http)
        self.running = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.running.run, args=([bound],))
        self.thread.start()
        while not self.running.started:
            assert self.thread.is_alive(), "the server ended before it began"
            time.sleep(0.01)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def stop(self):
        self.client.close()
        self.running.should_exit = True
        self.running.force_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    async def answer(self, name, expert, images):
        way = self.ways.get(name)
        if way == "raise":
            raise RuntimeError("gone")
        if way == "hang":
            await asyncio.sleep(3600)
        colours = images.float().mean((2, 3)) / 255
        grey = colours.mean(1)
        light = torch.stack([grey - 0.5, 0.5 - grey, torch.zeros(len(images))], 1)
        logits = dict(zip(STAND_INS.servers, (colours, light, (colours + light) / 2), strict=True))
        return Reply(10 * logits[name], colours[:, :0])

    def status(self, path):
        return self.client.get(path).status_code

    def post(self, *images, **more):
        return self.client.post(INFER, json=body(images, **more))

    def ask(self, *images, **options):
        """A response, and the data of its outputs by name."""
        found = self.post(*images, **options)
        assert found.status_code == 200, found.text
        outputs = found.json()["outputs"]
        return found.json(), {output["name"]: output["data"] for output in outputs}


@pytest.fixture
def serve():
    """A function that serves a toy in the background."""
    running = []

    def start(*given, **limits):
        running.append(Toy(*given, **limits))
        return running[-1]

    yield start
    for toy in running:
        toy.stop()


def png(*colour):
    """An image of one colour."""
    pixels = np.tile(np.array(colour, np.uint8), (6, 6, 1))
    return base64.b64encode(encoded(pixels)).decode()


RED = png(90, 0, 0)
GREEN = png(0, 200, 0)
BLUE = png(0, 0, 90)


INFER = "/v2/models/colours/infer"


def test_own_and_decoded_answers(serve):
    toy = serve()
    own, data = toy.ask(GREEN)
    assert own["parameters"]["answered_by"] == "expert-colours"
    assert (data["class"], data["label"]) == ([1], ["green"])
    # The probabilities are in float32.
    assert data["score"] == pytest.approx([1 - max(data["probabilities"])], abs=1e-6)
    toy.ways["expert-colours"] = "raise"
    decoded, again = toy.ask(GREEN, id="7")
    assert decoded["id"] == "7"
    assert decoded["parameters"]["answered_by"] == "expert-lights,coded-0"
    assert again["probabilities"] == pytest.approx(data["probabilities"], abs=1e-5)


def test_readiness_and_metrics(serve):
    toy = serve()
    assert toy.status("/v2/health/live") == toy.status("/v2/health/ready") == 200
    toy.ways["expert-colours"] = "raise"
    toy.ask(RED)
    assert toy.status("/v2/health/ready") == 200  # the others make up for it
    toy.ways["coded-0"] = "raise"
    assert refusal(toy.post(RED)) == (503, "LostError", "1")
    assert toy.status("/v2/health/ready") == toy.status("/v2/models/colours/ready") == 503
    assert toy.status("/v2/models/lights & darks/ready") == 200
    metrics = toy.client.get("/metrics").text.splitlines()
    assert {
        'coin_queries_total{end="LostError"} 1.0',
        'coin_queries_total{end="decoded"} 1.0',
        'coin_server_up{server="coded-0"} 0.0',
        'coin_server_up{server="expert-lights"} 1.0',
    } <= set(metrics)
    toy.ways.clear()
    toy.ask(RED)
    assert toy.status("/v2/models/colours/ready") == 200


def refusal(found):
    return found.status_code, found.json()["kind"], found.headers["retry-after"]


def test_deadline_and_too_many_queries(serve):
    toy = serve(deadline=0.4, queries=1)
    toy.ways = dict.fromkeys(STAND_INS.servers, "hang")
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(toy.post, [RED, RED])
    assert set(map(refusal, found)) == {(504, "DeadlineError", "1"), (429, "OverloadedError", "1")}


MISTAKES = {
    "model": (
        {"url": "/v2/models/magic/infer"},
        404,
        "expected one of colours, lights & darks, all",
    ),
    "no image": ({"json": body(["aGVsbG8="])}, 400, "found no whole image"),
    "too many": ({"json": body([RED] * 5)}, 413, "at most 4"),
    "too large": ({"json": body(["A" * 9000])}, 413, "expected at most 5000"),
    "no length": ({"content": iter([b"{", b"}"])}, 400, "wrong at inputs"),
    "packed": ({"content": b"\x1f\x8b"}, 400, "expected plain JSON"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_a_status_and_one_line(serve, name):
    request, status, message = MISTAKES[name]
    found = serve().client.post(**{"url": INFER} | request)
    assert found.status_code == status
    assert message in found.text
    assert "\n" not in found.text


def half_sent(toy, content=bytes(100), length=1_000_000):
    """Begin an upload."""
    connection = socket.create_connection(("127.0.0.1", toy.port))
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + content)
    connection.settimeout(5)
    return connection


def status_of(connection):
    """The status that a connection is answered with."""
    with connection:
        return int(connection.recv(100).split()[1])


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize(("limits", "status"), [({"bytes": 1000}, 413), ({"queries": 1}, 429)])
def test_a_client_that_still_sends_is_told_why_it_is_refused(serve, http, limits, status):
    """A connection that is closed with half of the body on its way is reset, and the answer may be lost."""
    toy = serve(http, **limits)
    with half_sent(toy):  # the only query that may run, where it is one
        time.sleep(0.2)
        connection = half_sent(toy, length=300_100)
        for _ in range(3):
            connection.sendall(bytes(100_000))
            time.sleep(0.3)
        assert status_of(connection) == status
    assert toy.status("/v2/health/live") == 200


def test_half_sent_bodies_hold_nobody_up_and_end(serve):
    toy = serve(bytes=2_000_000, reading=1.5, queries=16)
    slow = [half_sent(toy) for _ in range(14)]
    time.sleep(0.3)
    began = time.monotonic()
    toy.ask(RED)
    assert time.monotonic() - began < 1.0
    slow += [half_sent(toy) for _ in range(2)]
    time.sleep(0.2)
    assert toy.post(RED).status_code == 429
    assert {status_of(connection) for connection in slow} == {408}
    toy.ask(RED)


def test_the_deadline_begins_before_the_body_is_read(serve):
    toy = serve(deadline=1.5)
    toy.ways = dict.fromkeys(STAND_INS.servers, "hang")
    content = json.dumps(body([RED])).encode()
    began = time.monotonic()
    connection = half_sent(toy, content[:50], len(content))
    time.sleep(1.0)
    connection.sendall(content[50:])
    assert status_of(connection) == 504
    assert time.monotonic() - began < 2.3


def test_large_images_do_not_hold_small_ones_up(serve):
    toy = serve(bytes=2**23, samples=64)
    image = base64.b64encode(encoded(np.zeros((4096, 4096), np.uint8))).decode()
    waited = []
    with ThreadPoolExecutor(8) as pool:
        works = [pool.submit(toy.post, *[image] * count) for count in (64, 2, 1, 1, 1, 1)]
        while not all(work.done() for work in works):
            began = time.monotonic()
            toy.ask(RED)
            waited.append(time.monotonic() - began)
    assert [work.result().status_code for work in works] == [413, 413, 200, 200, 200, 200]
    assert max(waited) < 2


def test_a_task_may_not_have_the_name_of_all():
    system = replace(SYSTEM, classes={"all": ["a"], "b": ["c"]})
    with pytest.raises(ConfigurationError, match="a task 'all'"):
        make_app(FrontEnd(system, {}, Limits()))


@pytest.fixture
def triton(serve):
    """Triton's module and its client."""
    module = pytest.importorskip("tritonclient.http", reason="pip install 'tritonclient[http]'")
    with module.InferenceServerClient(f"127.0.0.1:{serve().port}") as client:
        yield module, client


def tensor(module, binary=False):
    made = module.InferInput("images", [1], "BYTES")
    made.set_data_from_numpy(np.array([GREEN], dtype=object), binary_data=binary)
    return made


@pytest.mark.parametrize("model", [*CLASSES, "all"])
def test_tritons_client_reads_what_the_metadata_says(triton, model):
    module, client = triton
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(model)
    assert client.get_server_metadata()["models"] == [*CLASSES, "all"]
    found = client.infer(model, [tensor(module)], request_id="x")
    assert found.get_response()["id"] == "x"
    kinds = {"INT64": np.int64, "BYTES": np.object_, "FP32": np.float32}
    for output in client.get_model_metadata(model)["outputs"]:
        array = found.as_numpy(output["name"])
        assert array.dtype == kinds[output["datatype"]]
        assert array.shape == (1, *output["shape"][1:])


def test_what_tritons_client_asks_for_as_bytes_comes_as_json(triton):
    module, client = triton
    asked = [module.InferRequestedOutput(name, binary_data=True) for name in ("class", "label")]
    found = client.infer("colours", [tensor(module)], outputs=asked)
    assert len(found.get_response()["outputs"]) == 2
    assert found.as_numpy("class").tolist() == [1]
    assert found.as_numpy("label").tolist() == ["green"]


def test_tritons_client_is_told_its_mistakes(triton):
    module, client = triton
    with pytest.raises(module.InferenceServerException, match=r"\(binary_data=False\)"):
        client.infer("colours", [tensor(module, binary=True)])
