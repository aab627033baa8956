"""How serving starts Ray and leaves it again, on a Ray that only notes what it is told."""

import sys
from types import ModuleType
from typing import Any

import pytest

from coin.errors import ServingError
from coin.serving import ray_app
from coin.serving.ray_app import RayOptions, start


class NotedRay:
    """Modules ``ray`` and ``ray.serve`` that note the calls; `fails` says which of these raises."""

    def __init__(self, fails: str = "", running: tuple[str, ...] = ()) -> None:
        self.calls: list[str] = []
        self.fails = fails
        self.connected = False
        self.applications = dict.fromkeys(running)
        self.ray, self.serve = ModuleType("ray"), ModuleType("ray.serve")
        modules: tuple[tuple[ModuleType, dict[str, Any]], ...] = (
            (self.ray, {"init": self.init, "shutdown": self.disconnect, "is_initialized": lambda: self.connected}),
            (self.serve, {"start": self.noted("start"), "run": self.run, "delete": self.delete}),
            (self.serve, {"shutdown": self.noted("serve.shutdown"), "status": lambda: self}),
            (self.serve, {"get_app_handle": self.noted("get_app_handle")}),
        )
        for module, own in modules:
            vars(module).update(own)

    def note(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise RuntimeError("The node timed out during startup.\nThis could happen because of this or that.")

    def noted(self, name: str) -> Any:
        return lambda *_, **__: self.note(name)

    def init(self, *_: Any, **__: Any) -> None:
        self.note("init")
        self.connected = True

    def disconnect(self) -> None:
        self.connected = False

    def run(self, *_: Any, name: str, **__: Any) -> None:
        self.note("run")
        self.applications[name] = None

    def delete(self, name: str) -> None:
        self.note("delete")
        self.applications.pop(name, None)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(noted: NotedRay) -> NotedRay:
        monkeypatch.setitem(sys.modules, "ray", noted.ray)
        monkeypatch.setitem(sys.modules, "ray.serve", noted.serve)
        monkeypatch.setattr(ray_app, "ray_application", lambda *_: "an application")
        monkeypatch.setattr(ray_app, "set_ray_variables", lambda address: None)
        return noted

    return install


SYSTEM: Any = None  # `ray_application` alone reads it


def test_a_ray_that_does_not_come_up_is_one_line_and_starts_no_other(use: Any) -> None:
    noted = use(NotedRay(fails="init"))
    with pytest.raises(ServingError, match=r"Ray cannot serve here \(The node timed out during startup\.\); see"):
        start(SYSTEM, RayOptions())
    assert noted.calls == ["init"]  # each function of Serve's would start a cluster of its own


@pytest.mark.parametrize("others", [(), ("theirs",)])
def test_only_the_own_application_of_a_joined_cluster_is_stopped(use: Any, others: tuple[str, ...]) -> None:
    noted = use(NotedRay(running=others))
    stop = start(SYSTEM, RayOptions(address="auto"))
    assert list(noted.applications) == [*others, "coin"]
    stop()
    assert list(noted.applications) == list(others)
    assert ("serve.shutdown" in noted.calls) == (others == ())
    assert not noted.connected


def test_an_application_that_does_not_start_is_removed_and_others_stay(use: Any) -> None:
    noted = use(NotedRay(fails="run", running=("theirs",)))
    with pytest.raises(ServingError, match="Ray cannot serve here"):
        start(SYSTEM, RayOptions(address="auto"))
    assert list(noted.applications) == ["theirs"]
    assert "serve.shutdown" not in noted.calls
    assert not noted.connected


def test_a_cluster_that_serves_a_run_already_is_left_as_it_is(use: Any) -> None:
    noted = use(NotedRay(running=("coin",)))
    with pytest.raises(ServingError, match="found an application 'coin' in the cluster, expected none"):
        start(SYSTEM, RayOptions(address="auto"))
    assert list(noted.applications) == ["coin"]
    assert not noted.connected
