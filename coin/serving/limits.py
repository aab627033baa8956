"""The limits on waiting and on a query's size."""

from dataclasses import dataclass

from coin.core.choices import check_number


class _Positive:
    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_number(name, value, low=0, strict=True)


@dataclass(frozen=True)
class Limits(_Positive):
    """The limits on waiting, all positive.

    Args:
        deadline: Seconds after which a query fails, including the time to read it.
        timeout: Seconds that a server has for one batch.
        queries: The largest number of running queries, including those being read.
        queue: The largest number of requests waiting for one server.
        batch: The largest number of inputs per batch; a larger query is cut.
        initial_lateness: Seconds after which an own answer is late, before any was measured.
        failures: The number of consecutive failures after which a server is considered down.
        cooldown: Seconds between probes of a server that is considered down.
    """

    deadline: float = 10.0
    timeout: float = 2.0
    queries: int = 1024
    queue: int = 256
    batch: int = 8
    initial_lateness: float = 0.1
    failures: int = 3
    cooldown: float = 1.0


@dataclass(frozen=True)
class InputLimits(_Positive):
    """The limits on the size of a query, and of all queries being read together; all positive.

    Args:
        bytes: The largest body, unpacked.
        pixels: The largest number of pixels of one image.
        aspect: The largest ratio of an image's longer side to its shorter side.
        samples: The largest number of images or texts in one query.
        values: The largest number of values in JSON, which is slow to parse; use the binary extension for more.
        seconds: How long a body may take to arrive.
        held_bytes: The limit on all bodies being read; each may take half of what is free.
        held_pixels: The same for all image files being decoded.
    """

    bytes: int = 8 * 2**20
    pixels: int = 4096 * 4096
    aspect: float = 20.0
    samples: int = 64
    values: int = 2**20
    seconds: float = 5.0
    held_bytes: int = 128 * 2**20
    held_pixels: int = 128 * 2**20
