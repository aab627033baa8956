"""The application on Ray Serve: a deployment for each server, and the front end before them."""

import asyncio
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coin.core.choices import check_number
from coin.core.memory import keep_freed_memory
from coin.core.ray_cluster import set_ray_variables, start_ray
from coin.errors import OverloadedError, ServingError, first_line
from coin.files.packaged import extra_module
from coin.serving.breaker import Call
from coin.serving.front_end import FrontEnd
from coin.serving.limits import Limits
from coin.serving.servers import Reply, Request, check_finite, run_together
from coin.serving.system import System

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


class ModelProcess:
    """A server in its own process: one network, or all of a replica, and one pass at a time."""

    def __init__(self, system: System, name: str, device: str, batch: int) -> None:
        from ray import serve

        torch.set_num_threads(1)
        network_of = system.reader(device)
        paths = list(dict.fromkeys(system.files[name]))
        for path in paths:
            network_of(path)
        keep_freed_memory()  # but for what reading took
        if paths:  # a benchmark's server has none
            black = torch.zeros(1, 3, system.image_size, system.image_size, dtype=torch.uint8)
            network = network_of(paths[-1])
            network(black)  # the first query need not wait for what a first pass takes
        thread = ThreadPoolExecutor(1, "pass")

        async def run(requests: list[Request]) -> list[Reply]:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(thread, run_together, network_of, requests)

        self._files = system.files[name]
        self._run = serve.batch(max_batch_size=batch, batch_wait_timeout_s=0.0)(run)

    async def __call__(self, expert: int, images: Tensor) -> Any:
        """Return the reply to stored images, as an expert."""
        return await self._run(Request(self._files[expert], expert, images))


class FrontEndProcess:
    """The front end's process, to which Ray Serve adds the application as `app`."""

    app: Any

    def __init__(self, *servers: Any) -> None:
        """Set the servers' deployments, which makes Ray start them."""

    async def drain(self) -> None:
        """Take no more queries, and wait for running ones."""
        await self.app.state.drain()


def _call(server: str) -> Call:
    """Return what asks a server's deployment; for within the front end's process."""
    from ray import serve
    from ray.serve.exceptions import BackPressureError

    handle = serve.get_deployment_handle(server, _APPLICATION)

    async def call(expert: int, images: Tensor) -> Reply:
        response = handle.remote(expert, images)
        try:
            return check_finite(await response)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            raise OverloadedError("its queue is full") from error

    return call


def ray_application(system: System, options: RayOptions) -> Any:
    """Return the Ray Serve application, for ``serve.run``."""
    from ray import serve

    limits = options.limits
    device = "cuda" if options.gpus > 0 else "cpu"
    resources = {} if options.node is None else {options.node: 1}
    server = serve.deployment(ModelProcess).options(
        ray_actor_options={"num_cpus": 0, "num_gpus": options.gpus, "resources": resources},
        max_ongoing_requests=2 * limits.batch,
        max_queued_requests=limits.queue,
        **_STOPPING,
    )
    names = system.stand_ins.servers
    servers = [server.options(name=name).bind(system, name, device, limits.batch) for name in names]

    def build() -> Any:
        from coin.serving.app import make_app

        calls = {name: _call(name) for name in names}
        return make_app(FrontEnd(system, calls, limits))

    front = serve.deployment(serve.ingress(build)(FrontEndProcess)).options(
        name="front-end",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * limits.queries,
        logging_config={"encoding": "JSON"},
        **_STOPPING,
    )
    return front.bind(*servers)


def start(system: System, options: RayOptions) -> Callable[[], None]:
    """Serve on Ray Serve, else a ServingError, until the returned function is called; running queries finish first.

    Of a cluster that was joined other applications run on.
    """
    set_ray_variables(options.address)
    serve = extra_module("ray.serve", "serve")
    import ray

    # Also for a front end that was killed, until Ray has another.
    waits = options.limits.deadline + 5.0
    http = {"host": options.host, "port": options.port, "request_timeout_s": waits}
    try:
        with ExitStack() as undo:
            undo.callback(ray.shutdown)  # Serve's functions would start Ray again
            start_ray(options.address)
            serve.start(proxy_location="HeadOnly", http_options=http)
            if _APPLICATION in serve.status().applications:
                found = f"found an application '{_APPLICATION}' in the cluster"
                raise ServingError(f"{found}, expected none; stop that first")
            undo.callback(_stop, serve, options.limits.deadline)
            serve.run(ray_application(system, options), name=_APPLICATION, route_prefix="/")
            return undo.pop_all().close
    except Exception as error:  # Ray's errors share no base class
        reason = first_line(error)
        raise ServingError(f"Ray cannot serve here ({reason}); see its logs in /tmp/ray") from error


def _stop(serve: Any, deadline: float) -> None:
    """Stop the application when its running queries have ended, and Serve if there is no other."""
    with suppress(Exception):  # whoever cannot be drained is stopped all the same
        front_end = serve.get_app_handle(_APPLICATION)
        front_end.drain.remote().result(timeout_s=deadline)
        time.sleep(0.5)  # for a front end's last word to pass Ray's proxy
    with suppress(Exception):
        serve.delete(_APPLICATION)
        if not serve.status().applications:
            serve.shutdown()


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
