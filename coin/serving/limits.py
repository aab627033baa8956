"""The limits on waiting, and on the size of a query."""

from dataclasses import dataclass

from coin.core.choices import check_number


@dataclass(frozen=True)
class Limits:
    """The limits on waiting, and on the size of a query; all positive.

    Args:
        deadline: Seconds after which a query fails, including the time to read it.
        timeout: Seconds after which a request to a server is lost. A request that would wait for more than 0.7 of this
            is refused at once; the rest is for waits longer than expected.
        reading: Seconds that a query's body may take to arrive.
        initial_lateness: Seconds after which an own answer is late, before any was measured.
        queries: The largest number of running queries, including those being read.
        queue: The largest number of requests waiting for one server; `batch`, that it runs together.
        samples: The largest number of images in one query.
        bytes: The largest body; `pixels`: the largest number of pixels of a query's images together.
    """

    deadline: float = 10.0
    timeout: float = 2.0
    reading: float = 5.0
    initial_lateness: float = 0.1
    queries: int = 256
    queue: int = 256
    batch: int = 8
    samples: int = 64
    bytes: int = 8 * 2**20
    pixels: int = 4096 * 4096

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_number(name, value, low=0, strict=True)
