"""See every call of a ruled function while a network runs, whichever module makes it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coin.statistics.attention import packed_attention
from coin.statistics.rules import Call, recognise

Visit = Callable[[Call, dict[str, str], Tensor | None, Callable[[], Tensor]], Tensor | None]
"""(call, role → trainable parameter's name, its input if any, the function itself) → the output to use, or None."""

_SORTING = {"sort", "argsort", "topk", "unique", "unique_consecutive", "repeat_interleave", "gather", "tolist", "item"}
_SORTING |= {"take", "take_along_dim", "put", "index_select", "index_add", "index_copy", "index_put", "index_fill"}
_SORTING |= {"masked_select", "masked_scatter", "scatter", "scatter_add", "scatter_reduce", "numpy"}
_SORTING |= {"__bool__", "__int__", "__float__", "__index__"}
"""Functions by which values can decide where a row goes; those that work in place have the same names."""


class Interceptor(TorchFunctionMode):
    """Hands the calls of ruled functions whose weight is a trainable parameter of the network to a visitor.

    Functions are watched and not modules: a module's weight that is used without its forward (Swin's attention), or a
    subclass that computes something else first (ConvNeXt's LayerNorm2d), is then treated by what is computed.

    Attributes:
        sorts: Whether the network did anything by which values decide where a row goes, as a mixture of experts does:
            what lies where may then differ from batch to batch.
    """

    def __init__(self, parameters: Mapping[str, Tensor], visit: Visit) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._visit = visit
        self.sorts = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:  # the projections inside are calls like any other
                result = packed_attention(args, options)
            return func(*args, **options) if result is None else result
        self.sorts = self.sorts or _sorts(func, args)
        recognised = recognise(func, args, options)
        if recognised is not None:
            call, roles, source = recognised
            names = {role: self._names[id(t)] for role, t in roles.items() if id(t) in self._names}
            # A weight or bias that was computed from something trainable must stay in autograd's hands.
            foreign = any(t.requires_grad and id(t) not in self._names for t in roles.values())
            if names and not foreign and len(set(names.values())) == len(names):
                output = self._visit(call, names, source, lambda: func(*args, **options))
                if output is not None:
                    return output
        return func(*args, **options)


def _sorts(func: Any, args: tuple[Any, ...]) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("__getitem__", "__setitem__") and not isinstance(args[0], nn.Parameter):
        places = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(place, Tensor | list) for place in places)
    return name in _SORTING or name.removesuffix("_") in _SORTING
