"""The recommended system in one call: a packed body, an adapter for each expert, and the experts' own heads."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from coin.coding import DecoderKind, uniform
from coin.errors import ConfigurationError
from coin.merging import Method, Refit, merge_networks
from coin.modules.coded import Coded


def stand_in(
    experts: Sequence[nn.Module],
    calibration: Sequence[Iterable[Any]],
    *,
    rank: int = 16,
    bits: int = 4,
    method: type[Method] = Refit,
    initial: nn.Module | None = None,
    names: Sequence[str] | None = None,
) -> Coded:
    """Make one small network that answers in place of any number of lost experts.

    It is a body in few bits a value, with an adapter for each expert, whose own head reads the body's features. The
    body is merged by `method` with the uniform code; other codes, methods' options and decoders are `merge_networks`'
    and `Coded.fit_decoder`'s.

    Args:
        experts: The N networks, fine-tuned from one start.
        calibration: For every expert the batches of inputs ``[B, ...]`` of its own task, without labels; some 200
            samples of each.
        rank: The rank of what an adapter adds to each matrix; 0 for scales and biases alone.
        bits: Bits a value, 1 to 8.
        method: The class of the merge method, such as `Refit`, or `Base`, the start itself.
        initial: The start, for `Base`, and for what else reads it.
        names: The experts' names, by which `Coded.answer` may ask; ``0``, ``1``, … by default.

    Raises as `merge_networks` and `Coded.fit_decoder`, and ConfigurationError where the method is not a class.

    >>> experts = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)) for _ in "ab"]
    >>> system = coin.stand_in(experts, [[torch.randn(60, 4)], [torch.randn(60, 4)]], names="ab")
    >>> system.answer(torch.randn(5, 4), expert="b").shape
    torch.Size([5, 3])
    """
    if not isinstance(method, type):
        raise ConfigurationError(f"found method {method!r}, expected a class, such as coin.Refit")
    code = uniform(len(experts))
    made = method(adapters={"rank": rank}, compress={"bits": bits})
    merged = merge_networks(made, experts, code, initial=initial, calibration=calibration)
    (label,) = made.compressed_labels
    system = Coded(code, experts, merged.compressed[label], names)
    return system.fit_decoder(calibration[0], range(len(experts)), DecoderKind.expert_head)
