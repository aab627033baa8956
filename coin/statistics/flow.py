"""Follow tensors through a network while it runs: which functions read them, and whether values place rows."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from coin.core.batches import tensors_in

# Functions that reorder by values, or hand these to Python, where they may decide anything.
_DECIDING = {"sort", "msort", "topk", "unique", "unique_consecutive", "tolist", "item", "numpy"}
_DECIDING |= {"__bool__", "__int__", "__float__", "__index__"}
# Functions whose floating-point results are choices, as integers and truth values are.
_ROUNDING = {"round", "floor", "ceil", "trunc", "sign", "sgn", "heaviside"}
# Functions whose results have the arguments' entries in the same place, or are attention under a mask.
_ARITHMETIC = {"mul", "add", "sub", "div", "truediv", "pow"}
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
_LOGIC = {"and", "or", "xor"}
_OPERATORS = _ARITHMETIC | _COMPARISONS | _LOGIC
_ENTRYWISE = set(_OPERATORS)
for _kind in ("", "r", "i"):
    _ENTRYWISE |= {f"__{_kind}{_name}__" for _name in _OPERATORS}
_ENTRYWISE |= {
    "multiply",
    "subtract",
    "divide",
    "true_divide",
    "addcmul",
    "addcdiv",
    "logical_and",
    "logical_or",
}
_ENTRYWISE |= {
    "where",
    "masked_fill",
    "maximum",
    "minimum",
    "clamp",
    "clamp_min",
    "clamp_max",
    "lerp",
}
_ENTRYWISE |= {"embedding", "scaled_dot_product_attention", "multi_head_attention_forward"}
# Of which the first argument alone gives values.
_LIKE = {"type_as", "to", "expand_as", "view_as", "reshape_as"}
_MARK = "_coin_mark"

Called = partial[Any]
"""A function with the arguments that it is called with."""


class Mark(NamedTuple):
    """What a tensor that is made of inputs or of parameters carries as an attribute.

    Attributes:
        is_learned: Whether it is made of parameters, whose values differ between networks.
        is_choice: Whether it is made of nothing but choices: comparisons, integers, rounded values.
    """

    is_learned: bool
    is_choice: bool


class Flow:
    """Follows a network's inputs and parameters from function to function.

    Attributes:
        placed: Whether values may have decided where a row goes: by sorting, by an index, by a product with choices.
        placed_by_learned: Whether these values were made of parameters.
        reads: How many functions have read the output of a node in autograd's graph, detached or not.
    """

    def __init__(self, inputs: Any) -> None:
        self.placed = False
        self.placed_by_learned = False
        self.reads: Counter[Any] = Counter()
        for tensor in tensors_in(inputs):
            setattr(tensor, _MARK, Mark(is_learned=False, is_choice=_is_discrete(tensor)))

    def through(self, function: Called, run: Callable[[Called], Any]) -> Any:
        """Return what a function returns when it is run, and follow the values."""
        name: str = getattr(function.func, "__name__", "")
        if not name.endswith("__"):
            name = name.removesuffix("_")  # functions that work in place have the same names
        values = _values(name, function)
        marks = [getattr(tensor, _MARK) for tensor in values if hasattr(tensor, _MARK)]
        self._note_placing(name, marks)
        result = run(function)
        made = tensors_in(result)
        if name == "__setitem__":
            made = [function.args[0]]
        if made:
            self.reads.update(tensor.grad_fn for tensor in _arguments(function))
        has_parameter = any(isinstance(each, nn.Parameter) for each in values)
        if marks or has_parameter:
            is_learned = has_parameter or any(mark.is_learned for mark in marks)
            are_choices = not has_parameter and all(mark.is_choice for mark in marks)
            for tensor in made:
                is_discrete = are_choices or name in _ROUNDING or _is_discrete(tensor)
                is_choice = is_discrete and len(marks) > 0
                if not isinstance(tensor, nn.Parameter):
                    setattr(tensor, _MARK, Mark(is_learned, is_choice))
        return result

    def _note_placing(self, name: str, marks: list[Mark]) -> None:
        """Note whether a function places rows by values with these marks."""
        if name in _DECIDING:
            deciding = marks
        elif len(marks) > 1 and name not in _ENTRYWISE:
            deciding = [mark for mark in marks if mark.is_choice]
        else:
            return
        if deciding:
            self.placed = True
        if any(mark.is_learned for mark in deciding):
            self.placed_by_learned = True


def _arguments(function: Called) -> list[Tensor]:
    return tensors_in((function.args, function.keywords))


def _values(name: str, function: Called) -> list[Tensor]:
    """Return the tensors whose values make a function's result."""
    if name in _LIKE:
        return tensors_in(function.args[0])
    if name == "__getitem__":
        source, index = function.args
        return [source, *_index_tensors(index)]
    if name == "__setitem__":
        _, index, value = function.args
        return [*_index_tensors(index), *tensors_in(value)]
    return _arguments(function)


def _index_tensors(index: Any) -> list[Tensor]:
    """Return the tensors of an index, of slices their ends."""
    parts = index if isinstance(index, tuple) else (index,)
    found = []
    for part in parts:
        if isinstance(part, slice):
            found += tensors_in([part.start, part.stop])
        else:
            found += tensors_in(part)
    return found


def _is_discrete(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())
