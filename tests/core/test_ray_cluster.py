"""Which requests a Ray cluster that is started here takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coin.core.ray_cluster import set_ray_variables
from coin.errors import ConfigurationError


def test_a_cluster_of_our_own_asks_for_a_token_and_a_running_one_decides_itself(monkeypatch):
    for name in ("USAGE_STATS_ENABLED", "worker_niceness", "ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(f"RAY_{name}", "0")  # which are left as they are
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    set_ray_variables("10.0.0.1:6379")
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    message = r"found RAY_AUTH_MODE=disabled, expected token: .*; unset it"
    with pytest.raises(ConfigurationError, match=message):
        set_ray_variables(None)
    monkeypatch.delenv("RAY_AUTH_MODE")
    set_ray_variables(None)
    assert os.environ["RAY_AUTH_MODE"] == "token"


CALL = """
from coin.core.ray_cluster import set_ray_variables, start_ray

set_ray_variables(None)
import grpc
import ray
from ray import serve

start_ray(None)

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Replica:
    def __call__(self) -> list[int]:
        import psutil

        found = psutil.Process().net_connections()
        return [each.laddr.port for each in found if each.status == "LISTEN"]

def status(port: int, method: str) -> str:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(method)(b"", timeout=10)
        except grpc.RpcError as error:
            return error.code().name
    return "answered"

serve.start(proxy_location="Disabled")
ports = serve.run(Replica.bind(), name="check", route_prefix=None).remote().result()
# A method that a port does not have is unimplemented, whoever calls it: one of the two ports has each.
for method in ("/ray.serve.ASGIService/HandleRequest", "/ray.rpc.CoreWorkerService/PushTask"):
    print("statuses", *sorted(status(port, method) for port in ports))
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.slow
def test_what_comes_without_credentials_to_a_replica_is_refused():
    pytest.importorskip("ray", reason="Ray Serve is not installed: pip install '.[serve]'")
    pytest.importorskip("psutil")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("RAY_AUTH_MODE", None)
    command = [sys.executable, "-W", "ignore", "-c", CALL]
    found = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    statuses = [line for line in found.stdout.splitlines() if line.startswith("statuses")]
    assert statuses == ["statuses UNAUTHENTICATED UNIMPLEMENTED"] * 2, found.stdout + found.stderr
