"""See every call of a ruled function while a network runs, whichever module makes it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from coin.statistics.attention import packed_attention
from coin.statistics.rules import Call, recognise

Visit = Callable[[Call, dict[str, str], Any], Any]
"""(call, role → trainable parameter's name, the input itself) → the output to use, or None for the function's own."""


class Interceptor(TorchFunctionMode):
    """Hands the calls of ruled functions whose weight is a trainable parameter of the network to a visitor.

    Functions are watched and not modules: a module's weight that is used without its forward (Swin's attention), or a
    subclass that computes something else first (ConvNeXt's LayerNorm2d), is then treated by what is computed.
    """

    def __init__(self, parameters: Mapping[str, Tensor], visit: Visit) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._visit = visit

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:  # the projections inside are calls like any other
                result = packed_attention(args, options)
            return func(*args, **options) if result is None else result
        recognised = recognise(func, args, options)
        if recognised is not None:
            call, roles = recognised
            names = {role: self._names[id(t)] for role, t in roles.items() if id(t) in self._names}
            # A weight or bias that was computed from something trainable must stay in autograd's hands.
            foreign = any(t.requires_grad and id(t) not in self._names for t in roles.values())
            if names and not foreign and len(set(names.values())) == len(names):
                tensors = [t for t in (*args, *options.values()) if isinstance(t, Tensor)]
                source = next((t for t in tensors if all(t is not role for role in roles.values())), None)
                result = self._visit(call, names, source)
                if result is not None:
                    return result
        return func(*args, **options)
