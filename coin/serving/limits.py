"""What bounds waiting, and what a query may bring."""

from dataclasses import dataclass

from coin.choices import check_number


class _Positive:
    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_number(name, value, low=0, strict=True)


@dataclass(frozen=True)
class Limits(_Positive):
    """What bounds waiting; all of them positive.

    Args:
        deadline: Seconds after which a query fails, reading it included.
        timeout: Seconds that a server gets for one batch.
        queries: The most queries at a time, those that are being read among them.
        queue: The most requests that wait for one server.
        batch: The most inputs that are sent to a server together; a query with more is cut.
        initial_lateness: Seconds after which an own answer is late, before there is any experience.
        failures: A server is believed to be down after so many failures on end.
        cooldown: Seconds until such a server is tried again, while nobody asks it.
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
    """What a query may bring, and all that are being read together; all of them positive.

    Args:
        bytes: The largest body, unpacked.
        pixels: The most pixels of one image.
        aspect: The longest side of an image over its shortest.
        samples: The most images or texts of one query.
        values: The most numbers in JSON, which takes long to read: larger arrays come in the binary extension.
        seconds: How long a body may take to arrive.
        held_bytes: Of all bodies that are being read; one may take half of what the others leave.
        held_pixels: Of all image files that are being decoded, likewise.
    """

    bytes: int = 8 * 2**20
    pixels: int = 4096 * 4096
    aspect: float = 20.0
    samples: int = 64
    values: int = 2**20
    seconds: float = 5.0
    held_bytes: int = 128 * 2**20
    held_pixels: int = 128 * 2**20
