"""Whether a network decides by values where rows go, and how many functions read a tensor: seen while it runs."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from coin.core.batches import tensors_in
from coin.statistics.intercept import Interceptor, Visit

# Functions that reorder by values, or hand these to Python, where they may decide anything.
_DECIDING = {"sort", "msort", "topk", "unique", "unique_consecutive", "tolist", "item", "numpy"}
_DECIDING |= {"__bool__", "__int__", "__float__", "__index__"}
# Functions whose floating-point results are choices, as integers and truth values are.
_ROUNDING = {"round", "floor", "ceil", "trunc", "sign", "sgn", "heaviside"}
# Functions whose results have the arguments' entries in the same place, or are attention under a mask.
_OPERATORS = {"mul", "add", "sub", "div", "truediv", "pow", "and", "or", "xor"}
_OPERATORS |= {"eq", "ne", "lt", "le", "gt", "ge"}
_ENTRYWISE = {"multiply", "subtract", "divide", "true_divide", "addcmul", "addcdiv", "lerp"}
_ENTRYWISE |= {"logical_and", "logical_or", "maximum", "minimum", "clamp", "clamp_min", "clamp_max"}
_ENTRYWISE |= {"where", "masked_fill", "embedding"}
_ENTRYWISE |= {"scaled_dot_product_attention", "multi_head_attention_forward", *_OPERATORS}
for _side in ("", "r", "i"):
    _ENTRYWISE |= {f"__{_side}{_name}__" for _name in _OPERATORS}
# Of which the first argument alone gives values.
_LIKE = {"type_as", "to", "expand_as", "view_as", "reshape_as"}
_MARK = "_coin_mark"


class Mark(NamedTuple):
    """The attribute of a tensor that is computed from a network's inputs or parameters.

    Attributes:
        is_learned: Whether parameters went into it, whose values differ between networks.
        is_choice: Whether nothing but choices went into it: comparisons, integers, rounded values.
    """

    is_learned: bool
    is_choice: bool


class Flow(Interceptor):
    """An interceptor that also follows which functions a network calls on what it computes of inputs and parameters.

    Rows are placed by values where a function sorts, hands values to Python, or combines a choice with another tensor
    other than entry by entry: as an index, or in a product of matrices with a one-hot one.

    Args:
        parameters: As of `Interceptor`.
        visit: The same.
        inputs: The network's, which are marked.

    Attributes:
        placed: Whether values may have decided where a row goes.
        placed_by_learned: Whether parameters went into these values.
        reads: How many functions have read the output of a node in autograd's graph, detached or not.
    """

    def __init__(self, parameters: Mapping[str, Tensor], visit: Visit, inputs: Any) -> None:
        super().__init__(parameters, visit)
        self.placed = False
        self.placed_by_learned = False
        self.reads: Counter[Any] = Counter()
        for tensor in tensors_in(inputs):
            setattr(tensor, _MARK, Mark(is_learned=False, is_choice=_is_discrete(tensor)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        name: str = getattr(func, "__name__", "")
        if not name.endswith("__"):
            name = name.removesuffix("_")  # functions that work in place have the same names
        arguments = tensors_in((args, options))
        values = _values(name, args) or arguments
        marks = [getattr(tensor, _MARK) for tensor in values if hasattr(tensor, _MARK)]
        self._note_placing(name, marks)
        result = super().__torch_function__(func, types, args, options)
        written = args[0] if name == "__setitem__" else result
        made = tensors_in(written)
        if made:
            self.reads.update(tensor.grad_fn for tensor in arguments)
        has_parameter = any(isinstance(tensor, nn.Parameter) for tensor in values)
        if not marks and not has_parameter:
            return result
        is_learned = has_parameter or any(mark.is_learned for mark in marks)
        are_choices = not has_parameter and all(mark.is_choice for mark in marks)
        makes_choices = are_choices or name in _ROUNDING
        for tensor in made:
            if not isinstance(tensor, nn.Parameter):
                is_choice = bool(marks) and (makes_choices or _is_discrete(tensor))
                setattr(tensor, _MARK, Mark(is_learned, is_choice))
        return result

    def _note_placing(self, name: str, marks: list[Mark]) -> None:
        """Note whether a function places rows by the values with these marks."""
        deciding: Iterable[Mark] = ()
        if name in _DECIDING:
            deciding = marks
        elif len(marks) > 1 and name not in _ENTRYWISE:
            deciding = [mark for mark in marks if mark.is_choice]
        for mark in deciding:
            self.placed = True
            self.placed_by_learned |= mark.is_learned


def _values(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors whose values make a function's result, if these are not all its arguments."""
    if name in _LIKE:
        return tensors_in(args[0])
    if name == "__getitem__":
        source, index = args
        return [source, *_index_tensors(index)]
    if name == "__setitem__":
        _, index, value = args
        return [*_index_tensors(index), *tensors_in(value)]
    return []


def _index_tensors(index: Any) -> list[Tensor]:
    """Return the tensors of an index, of slices their ends."""
    parts = index if isinstance(index, tuple) else (index,)
    found = []
    for part in parts:
        ends = [part.start, part.stop] if isinstance(part, slice) else part
        found += tensors_in(ends)
    return found


def _is_discrete(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())
