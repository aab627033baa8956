"""The application on Ray Serve: a deployment per expert, coded model and replica, and the front end before them."""

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coin.core.choices import check_number
from coin.core.memory import keep_freed_memory
from coin.core.ray_cluster import set_ray_variables, start_ray
from coin.errors import OverloadedError, ServingError, first_line
from coin.files.packaged import extra_module
from coin.serving.front_end import FrontEnd
from coin.serving.limits import Limits
from coin.serving.protocol import Description
from coin.serving.server_state import Server
from coin.serving.servers import Reply, Request, System, check_finite, run_together

_APPLICATION = "coin"  # in the cluster
_STOPPING = {"graceful_shutdown_timeout_s": 3.0, "graceful_shutdown_wait_loop_s": 0.1}


@dataclass(frozen=True)
class RayOptions:
    """Address and resources of serving.

    Args:
        host: The address to listen on, by default of this machine only; `port`, its port.
        address: The address of a running Ray cluster, such as ``auto``; by default a new one is started here.
        gpus: GPUs per server, or a fraction of one.
        node: A Ray resource of which every server takes one unit: nodes started with one unit (``ray start
            --resources='{"coin": 1}'``) then run one server each; with too few nodes serving does not start.
        limits: The limits on waiting, and on a query's size.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    address: str | None = None
    gpus: float = 0.0
    node: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_number("port", self.port, low=1, high=65536)
        check_number("gpus", self.gpus, low=0)


class ModelProcess:
    """One network, or all of a replica, in its own process, which runs one pass at a time."""

    def __init__(self, system: System, names: Sequence[str], device: str, batch: int) -> None:
        from ray import serve

        torch.set_num_threads(1)
        network_of = system.reader(names, device)
        keep_freed_memory()  # but for what loading took
        for path in dict.fromkeys(system.files[name] for name in names):
            network = network_of(path)
            network(network.probe)  # the first query need not wait for what a first pass takes
        thread = ThreadPoolExecutor(1, "pass")

        async def run(requests: list[Request]) -> list[Reply]:
            return await asyncio.get_running_loop().run_in_executor(
                thread, run_together, network_of, requests
            )

        self._system = system
        self._run = serve.batch(max_batch_size=batch, batch_wait_timeout_s=0.0)(run)

    async def __call__(self, name: str, images: Tensor) -> Any:
        """Return a network's reply to stored images."""
        path = self._system.files[name]
        expert = self._system.expert_of(name)
        return await self._run(Request(path, expert, images))


class FrontEndProcess:
    """The front end's process, to which Ray Serve adds the application as `app`."""

    app: Any

    def __init__(self, *servers: Any) -> None:
        """Set the servers' deployments, which makes Ray start them."""

    async def drain(self) -> None:
        """Take no more queries, and wait for running ones."""
        await self.app.state.drain()


def _asking(handle: Any, name: str) -> Server:
    from ray.serve.exceptions import BackPressureError

    async def ask(images: Tensor) -> Reply:
        response = handle.remote(name, images)
        try:
            return check_finite(await response)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            raise OverloadedError("its queue is full") from error

    return ask


def ray_application(system: System, about: Description, options: RayOptions) -> Any:
    """Return the Ray Serve application, for ``serve.run``."""
    from ray import serve

    limits = options.limits
    device = "cuda" if options.gpus > 0 else "cpu"
    resources = {} if options.node is None else {options.node: 1}
    servers = serve.deployment(ModelProcess).options(
        ray_actor_options={"num_cpus": 0, "num_gpus": options.gpus, "resources": resources},
        max_ongoing_requests=2 * limits.batch,
        max_queued_requests=limits.queue,
        **_STOPPING,
    )
    processes = system.stand_ins.processes
    deployments = []
    for process, names in processes.items():
        deployment = servers.options(name=process)
        deployments.append(deployment.bind(system, names, device, limits.batch))

    def build() -> Any:
        from coin.serving.app import make_app

        asking: dict[str, Server] = {}
        for process, names in processes.items():
            handle = serve.get_deployment_handle(
                process, app_name=serve.get_replica_context().app_name
            )
            for name in names:
                asking[name] = _asking(handle, name)
        front = FrontEnd(asking, system.stand_ins, system.policy, system.decode, limits)
        return make_app(front, about)

    front = serve.deployment(serve.ingress(build)(FrontEndProcess)).options(
        name="front-end",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * limits.queries,
        logging_config={"encoding": "JSON"},
        **_STOPPING,
    )
    return front.bind(*deployments)


def start(system: System, about: Description, options: RayOptions) -> Callable[[], None]:
    """Serve on Ray Serve, else a ServingError, until the returned function is called; running queries finish first.

    Of a cluster that was joined other applications run on.
    """
    set_ray_variables(options.address)
    serve = extra_module("ray.serve", "serve")
    import ray

    def stop() -> None:
        with suppress(Exception):  # whoever cannot be drained is stopped all the same
            front_end = serve.get_app_handle(_APPLICATION)
            front_end.drain.remote().result(timeout_s=options.limits.deadline)
            time.sleep(0.5)  # for a front end's last word to pass Ray's proxy
        with suppress(Exception):
            serve.delete(_APPLICATION)
            if not serve.status().applications:
                serve.shutdown()
        ray.shutdown()

    undo = ray.shutdown  # Serve's functions start Ray again where it is not there
    try:
        start_ray(options.address)
        # Also for a front end that was killed, until Ray has another.
        waits = options.limits.deadline + 5.0
        http = {"host": options.host, "port": options.port, "request_timeout_s": waits}
        serve.start(proxy_location="HeadOnly", http_options=http)
        if _APPLICATION in serve.status().applications:
            raise ServingError(
                f"found an application '{_APPLICATION}' in the cluster, expected none; stop that first"
            )
        undo = stop
        serve.run(ray_application(system, about, options), name=_APPLICATION, route_prefix="/")
    except Exception as error:  # Ray's errors share no base class
        undo()
        reason = first_line(error)
        raise ServingError(f"Ray cannot serve here ({reason}); see its logs in /tmp/ray") from error
    return stop


def check_port(options: RayOptions) -> None:
    """Raise `ServingError` if the port of a cluster of this machine alone is in use; Ray would share it silently."""
    if options.address is not None:
        return
    try:
        socket.create_server((options.host, options.port)).close()
    except OSError as error:
        place = f"{options.host}:{options.port}"
        message = f"found {place} in use ({error.strerror}), expected a free port; set --ray.port"
        raise ServingError(message) from error
