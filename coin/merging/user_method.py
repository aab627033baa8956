"""User-defined merge functions, evaluated like every other method."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coin.core.batches import size_of
from coin.errors import ConfigurationError
from coin.files.packaged import imported
from coin.files.tensors import State, weighted_sum
from coin.files.user_code import source_of
from coin.merging.average import average_parameters
from coin.merging.expert_sources import whole_state
from coin.merging.experts import Experts
from coin.merging.method import CodedModel, Compress, Method, fill
from coin.networks.calling import as_input, clone
from coin.networks.heads import without_head
from coin.networks.weights import fill_network
from coin.statistics.statistic import DataChoice


class UserMethod(Method):
    """A merge by a user's function, ``function(experts, calibration, **options)`` → the coded model.

    ``experts`` are copies of the N networks, with equally many outputs, in eval mode; ``calibration`` is every expert's
    list of its own task's batches ``[B, …]``. All tensors of the network that it returns are taken. A parameter called
    ``row`` gets the code row β, a list of N numbers; one called ``initial`` the shared initialisation, a network like
    the experts. Autograd is on, and torch's random numbers start from the run's seed.

    A function whose first parameter is called ``tensors`` merges one tensor at a time, so that N networks are never in
    memory at once: it gets the experts' N tensors of one name, as ``initial`` the shared initialisation's, as ``name``
    the name and as ``layer`` the module that has it, with arbitrary weights. The head, of its task alone, is averaged.

    Its cost is the wall time, and the samples that pass forward through the experts, the initialisation and copies.

    Args:
        function: Its import path, also relative to the working folder, or the function itself. If its source file
            changes, the coded models are made again.
        options: Its further arguments by name.
        label: Name of this variant in results; the function's by default.
        compress: As for every method (`coin.MergeMethod`).

    >>> coin.UserMethod("mine.merge", {"scale": 0.5}).label  # with merge(experts, calibration, scale) in mine.py
    'merge'
    """

    name = "user_method"
    reads_initial = True  # for all that is known of the class: so no other method starts from one
    batchnorm = ""  # the function's own business

    def __init__(
        self,
        function: str,  # of a configuration; a function is taken too
        options: dict[str, Any] | None = None,
        label: str | None = None,
        compress: Compress = None,
    ) -> None:
        if callable(function):
            self._function: Any = function
            own_name = getattr(function, "__name__", type(function).__name__)
            self.function = f"{function.__module__}.{own_name}"
        else:
            self._function = imported("function", str(function), "a Python function")
            self.function = str(function)
        self.options = options or {}
        try:
            signature = inspect.signature(self._function)
            self._by_tensor = next(iter(signature.parameters), "") == "tensors"
            offered = {"row", "initial", "name", "layer"} if self._by_tensor else {"row", "initial"}
            self._requested = offered & signature.parameters.keys()
            inputs = (None,) if self._by_tensor else (None, None)
            signature.bind(*inputs, **dict.fromkeys(self._requested), **self.options)
            written = inspect.unwrap(self._function)
            inspect.getfile(written)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"found function '{self.function}', expected a Python function of experts and calibration, or of "
                f"tensors, that takes the options {self.options} ({error}); change it, or its options"
            ) from error
        self.reads_initial = "initial" in self._requested
        _, _, name = self.function.rpartition(".")
        super().__init__(name.strip("<>") if label is None else label, compress)
        self._content = source_of(written) or ""  # of now: it may be edited while experts train

    def content_key(self) -> str:
        """Return a hash of the function's source file, and of modules beside it that this imports, at its import."""
        return self._content

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Call the function for one row of the code, and check what it returns; see `Method.make`."""
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            network = experts.empty_model().eval()
            torch.manual_seed(0 if experts.train is None else experts.train.seed)
            if self._by_tensor:
                fill(network, self._merged_tensors(experts, row))
            else:
                made = self._merged_network(experts, row)
                fill_network(
                    network, made.state_dict(), f"the network that {self.function} returned"
                )
        return CodedModel(network)

    def _merged_network(self, experts: Experts, row: Sequence[float]) -> nn.Module:
        """Call the function on networks, and return the one that it returns."""
        networks = [
            _counted(clone(network).eval(), experts) for network in experts.source.each_network()
        ]
        calibration = [
            [as_input(batch, networks[0]) for batch in own]
            for own in experts.samples(DataChoice.own)
        ]
        initial = None
        if self.reads_initial:
            parameters, buffers = experts.initial()
            initial = _counted(experts.empty_model().eval(), experts)
            fill(initial, {**parameters, **buffers})
        made = self._call(networks, calibration, row=list(row), initial=initial)
        if not isinstance(made, nn.Module):
            raise ConfigurationError(
                f"function '{self.function}' returned a {type(made).__name__}, "
                "expected a network like the experts; return one of them, or a copy"
            )
        return made

    def _merged_tensors(self, experts: Experts, row: Sequence[float]) -> State:
        """Call the function on the experts' tensors of each name, and return what it returns; the rest is averaged."""
        skeleton = experts.source.skeleton
        # Without masks, which are made.
        learnt = without_head(skeleton, list(skeleton.state_dict()))
        states = [whole_state(tensors) for tensors in experts.source.tensors]
        start = whole_state(experts.initial()) if self.reads_initial else {}
        merged = {
            **average_parameters(experts.parameters, row),
            **weighted_sum(experts.buffers, row),
        }
        for name, average in merged.items():
            if name not in learnt or not average.is_floating_point():
                continue
            owner, _, _ = name.rpartition(".")
            made = self._call(
                [state[name].clone() for state in states],
                row=list(row),
                initial=start[name].clone() if name in start else None,
                name=name,
                layer=skeleton.get_submodule(owner),
            )
            shape = list(average.shape)
            if not isinstance(made, Tensor) or list(made.shape) != shape:
                found = (
                    f"shape {list(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
                )
                raise ConfigurationError(
                    f"function '{self.function}' returned {found} for '{name}', expected a tensor of shape {shape}; "
                    "return the merged tensor"
                )
            merged[name] = made.detach().to(average.dtype)
        return merged

    def _call(self, *inputs: Any, **offered: Any) -> Any:
        """Call the function with what it asks for and its options."""
        requested = {name: offered[name] for name in self._requested}
        return self._function(*inputs, **requested, **self.options)


def _counted(network: nn.Module, experts: Experts) -> nn.Module:
    """Return a network whose passes, and those of its copies, are counted as the experts' passes."""

    def count(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        experts.passes += size_of(next(iter((*arguments, *named.values()))))

    network.register_forward_pre_hook(count, with_kwargs=True)
    return network
