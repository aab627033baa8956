"""How serving starts Ray and leaves it again, on a Ray that only notes what it is told."""

import socket
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from coin.errors import ConfigurationError, ServingError
from coin.serving import ray_app
from coin.serving.ray_app import ModelProcess, RayOptions, check_port, start

JOINED = RayOptions(address="auto")
SYSTEM = None  # `ray_application` alone reads it


class Ray:
    """Modules ``ray`` and ``ray.serve`` that note the calls; `fails` says which of these raises."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.fails = None
        self.connected = False
        self.applications = {}
        ray = ModuleType("ray")
        vars(ray).update(
            init=self.init, shutdown=self.disconnect, is_initialized=lambda: self.connected
        )
        serve = ModuleType("ray.serve")
        vars(serve).update(
            run=self.run,
            delete=self.delete,
            status=lambda: self,
            batch=lambda **_: lambda run: run,
        )
        for name in ("start", "shutdown", "get_app_handle"):
            setattr(serve, name, lambda *_, name=name, **__: self.note(name))
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.serve", serve)
        monkeypatch.setattr(ray_app, "ray_application", lambda *_: "an application")
        monkeypatch.setattr(ray_app, "set_ray_variables", lambda address: None)

    def note(self, name):
        self.calls.append(name)
        if name == self.fails:
            raise RuntimeError("The node timed out.\nThis could happen because of this or that.")

    def init(self, *_, **__):
        self.note("init")
        self.connected = True

    def disconnect(self):
        self.connected = False

    def run(self, *_, name, **__):
        self.note("run")
        self.applications[name] = None

    def delete(self, name):
        del self.applications[name]


@pytest.fixture
def ray(monkeypatch):
    return Ray(monkeypatch)


def test_a_ray_that_does_not_come_up_is_one_line_and_starts_no_other(ray):
    ray.fails = "init"
    with pytest.raises(ServingError, match=r"Ray cannot serve here \(The node timed out\.\); see"):
        start(SYSTEM, RayOptions())
    assert ray.calls == ["init"]  # each function of Serve's would start a cluster of its own


@pytest.mark.parametrize("others", [(), ("theirs",)])
def test_only_the_own_application_of_a_joined_cluster_is_stopped(ray, others):
    ray.applications = dict.fromkeys(others)
    stop = start(SYSTEM, JOINED)
    assert list(ray.applications) == [*others, "coin"]
    stop()
    assert list(ray.applications) == list(others)
    assert ("shutdown" in ray.calls) == (others == ())
    assert not ray.connected


REFUSED = {  # what is running, what fails, and the line
    "does not start": ("theirs", "run", "Ray cannot serve here"),
    "is there already": ("coin", None, "found an application 'coin' in the cluster, expected none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_application_that_cannot_be_started_leaves_the_cluster_as_it_is(ray, name):
    running, ray.fails, message = REFUSED[name]
    ray.applications = {running: None}
    with pytest.raises(ServingError, match=message):
        start(SYSTEM, JOINED)
    assert list(ray.applications) == [running]
    assert "shutdown" not in ray.calls
    assert not ray.connected


def test_a_port_in_use_is_refused_but_of_a_cluster_elsewhere():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ServingError, match=rf"found 127.0.0.1:{port} in use .*; set --ray.port"
        ):
            check_port(RayOptions(port=port))
        check_port(RayOptions(port=port, address="auto"))
    check_port(RayOptions(port=port))
    with pytest.raises(ConfigurationError, match="port=0"):
        RayOptions(port=0)


def test_a_server_gives_back_what_reading_took_and_keeps_what_a_pass_takes(ray, monkeypatch):
    """Memory that is freed after a call is kept; of compressed copies the last that was read is there."""
    done = []
    monkeypatch.setattr(ray_app.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(ray_app, "keep_freed_memory", lambda: done.append("keep"))

    @lru_cache(maxsize=1)
    def read(path):
        done.append(f"read {path}")
        return lambda images: done.append(f"pass {path}")

    files = {"replica-0": [Path("a"), Path("b"), Path("b")]}
    system = SimpleNamespace(files=files, image_size=4, reader=lambda device: read)
    ModelProcess(system, "replica-0", "cpu", 8)
    assert done == ["read a", "read b", "keep", "pass b"]
