"""User-defined merge functions, evaluated like every other method."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from coin.core.devices import seeded
from coin.errors import ConfigurationError
from coin.files.packaged import imported
from coin.files.user_code import source_of
from coin.merging.experts import Experts, fill
from coin.merging.method import CodedModel, Compress, Method
from coin.networks.calling import as_input, clone
from coin.networks.weights import fill_network
from coin.statistics.statistic import DataChoice


class UserMethod(Method):
    """A merge by a user's function, ``function(experts, calibration, **options)`` → the coded model.

    ``experts`` are copies of the N networks, with equally many outputs, in eval mode; ``calibration`` is every expert's
    list of its own task's batches ``[B, …]``. All tensors of the network that it returns are taken. A parameter called
    ``row`` gets the code row β, a list of N numbers; one called ``initial`` the shared initialisation, a network like
    the experts. Autograd is on, and torch's random numbers start from the run's seed.

    A method that needs neither networks nor samples at once is a subclass of `coin.MergeMethod`.

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
            self._requested = {"row", "initial"} & signature.parameters.keys()
            signature.bind(None, None, **dict.fromkeys(self._requested), **self.options)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"found function '{self.function}', expected a Python function of experts and calibration that takes "
                f"the options {self.options} ({error}); change it, or its options"
            ) from error
        self.reads_initial = "initial" in self._requested
        _, _, name = self.function.rpartition(".")
        super().__init__(name.strip("<>") if label is None else label, compress)
        self._content = (
            source_of(self._function) or ""
        )  # of now: it may be edited while experts train

    def content_key(self) -> str:
        """Return a hash of the function's source file, and of modules beside it that this imports, at its import."""
        return self._content

    def make(self, experts: Experts, row: Sequence[float]) -> CodedModel:
        """Call the function for one row of the code, and check what it returns; see `Method.make`."""
        seed = 0 if experts.train is None else experts.train.seed
        with torch.inference_mode(False), torch.enable_grad():
            networks = [clone(network).eval() for network in experts.source.each_network()]
            calibration = [
                [as_input(batch, networks[0]) for batch in own]
                for own in experts.samples(DataChoice.own)
            ]
            given: dict[str, Any] = {"row": list(row)}
            if self.reads_initial:
                given["initial"] = experts.empty_model().eval()
                parameters, buffers = experts.initial()
                fill(given["initial"], {**parameters, **buffers})
            requested = {name: given[name] for name in self._requested}
            with seeded(seed, experts.source.device):
                made = self._function(networks, calibration, **requested, **self.options)
            if not isinstance(made, nn.Module):
                raise ConfigurationError(
                    f"function '{self.function}' returned a {type(made).__name__}, "
                    "expected a network like the experts; return one of them, or a copy"
                )
            network = experts.empty_model().eval()
            fill_network(network, made.state_dict(), f"the network that {self.function} returned")
        return CodedModel(network)
