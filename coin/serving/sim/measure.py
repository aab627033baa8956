"""What this machine takes for a query, and what networks are worth whose weights are rounded.

In seconds of one processor core, as `coin serve` runs its servers unless it is told otherwise.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coin.coding import Answers, Code, DecoderConfig, make_decoder
from coin.data.transform import to_input
from coin.networks import load_network
from coin.serving.decodings import Decodings
from coin.serving.model import NetworkServer
from coin.serving.replies import Reply, ReplyFormat
from coin.serving.sim.redundancy import Precision

_WARM_UP, _REPEATS, _BATCH = 20, 200, 8


def rounded(values: Tensor, precision: Precision) -> tuple[Tensor, int]:
    """Return what a tensor is once it was kept in a precision, and the bytes that it took."""
    if precision is Precision.full or not values.is_floating_point():
        return values, values.numel() * values.element_size()
    if precision is Precision.half:
        return values.half().to(values.dtype), 2 * values.numel()
    if values.ndim < 2:
        return values, values.numel() * values.element_size()
    scale = values.flatten(1).abs().amax(1).clamp(min=torch.finfo(values.dtype).tiny) / 127
    scale = scale.view(-1, *[1] * (values.ndim - 1))
    return (values / scale).round() * scale, values.numel() + 4 * len(values)


def kept_bytes(path: Path, precision: Precision = Precision.full) -> int:
    """Return the bytes of a network's weights and buffers in a precision."""
    return sum(rounded(values, precision)[1] for values in load_network(path).network.state_dict().values())


@torch.no_grad()
def measure_accuracy(path: Path, precision: Precision, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the accuracy of a network with rounded weights.

    Args:
        path: The network.
        precision: What its weights are rounded to.
        batches: Of a test set, as it is stored: inputs and labels.
    """
    file = load_network(path)
    state = {name: rounded(values, precision)[0] for name, values in file.network.state_dict().items()}
    file.network.load_state_dict(state)
    right = count = 0
    for stored, labels in batches:
        logits = file.network(to_input(stored, file.config.image_size))
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return right / count


def measure_service(server: NetworkServer) -> tuple[NDArray[np.float64], float]:
    """Return the seconds that a server takes for one input ``[200]``, and what each further one of 8 adds, as a share.

    The share is of medians, and not negative.
    """
    draw = torch.Generator().manual_seed(0)
    one = server.probe
    if one.dtype == torch.uint8:
        one = torch.randint(256, tuple(one.shape), generator=draw, dtype=torch.uint8)
    several = one.repeat(_BATCH, *[1] * (one.ndim - 1))
    times = _times(lambda: server(one))
    more = _times(lambda: server(several), _REPEATS // _BATCH)
    return times, max(0.0, float(np.median(more) / np.median(times) - 1) / (_BATCH - 1))


def measure_decoding(
    code: Code, config: DecoderConfig, expects: ReplyFormat, feature_widths: Sequence[int] | None = None
) -> float:
    """Return the median seconds that it takes to decode one expert's answer to one input.

    The decoder is fitted on random numbers: what it takes does not depend on them.

    Args:
        code: The code.
        config: The decoder.
        expects: The format of the servers' replies.
        feature_widths: The widths of the stages within their features.
    """
    draw = torch.Generator().manual_seed(0)
    count, rows = code.num_experts, code.num_coded
    samples = 64 + 2 * (config.components or 0)

    def replies(inputs: int) -> list[Reply]:
        widths = (expects.outputs, expects.features or 0)
        made = [[torch.randn(inputs, width, generator=draw) for width in widths] for _ in range(count + rows)]
        return [Reply(logits, features if expects.features else None) for logits, features in made]

    fit = replies(samples)
    features = None if fit[0].features is None else [reply.features for reply in fit if reply.features is not None]
    decoder = make_decoder(config, code, [0]).fit(
        Answers(
            experts=torch.stack([reply.logits for reply in fit[:count]]),
            coded=torch.stack([reply.logits for reply in fit[count:]]),
            expert_features=None if features is None else features[:count],
            coded_features=None if features is None else features[count:],
            feature_widths=feature_widths,
            tasks=torch.arange(samples) % count,
        )
    )
    decodings = Decodings(code, [decoder], feature_widths)
    arrived = dict(enumerate(replies(1)))
    del arrived[0]
    return float(np.median(_times(lambda: decodings.decode(arrived))))


def _times(action: Callable[[], object], repeats: int = _REPEATS) -> NDArray[np.float64]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = np.empty(_WARM_UP + repeats)
        for place in range(len(times)):
            started = time.process_time()  # not a clock's: others may be at work on this machine
            action()
            times[place] = time.process_time() - started
        return times[_WARM_UP:]
    finally:
        torch.set_num_threads(threads)
