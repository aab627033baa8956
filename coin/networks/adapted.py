"""One body and N adapters as a network that answers as any of its experts."""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from coin.core.batches import tensors_in
from coin.errors import ConfigurationError, StateError
from coin.files.tensors import nbytes
from coin.networks.adapter import Adapter, Change
from coin.networks.calling import clone
from coin.networks.delta import Rounded
from coin.networks.heads import head_name, with_head
from coin.networks.kept import (
    ANSWERING,
    Kept,
    keep,
    kept_parameters,
    looks_up,
    not_makeable,
    take_out_norms,
    unpacked,
)
from coin.networks.weights import stored


class Adapted(nn.Module):
    """One body and N adapters; called with ``experts=``, an expert or one for each sample ``[B]``, it answers as these.

    The body's parameters that adapters change are made when a layer reads them: nothing else is kept, and threads can
    ask for different experts at once. A batch of mixed experts runs once for each expert in it. Logits are those of the
    body's head, on features that are the expert's.

    Args:
        body: The body, with which it shares all tensors; `coin.Compressed.packed` gives one whose weights stay packed.
        adapters: Those of the N experts, which change a parameter in the same parts and rank, or not at all; none for a
            network that is the same for all.

    >>> networks = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)) for _ in experts]
    >>> adapted = coin.fit_adapters(networks[0], networks, inputs, rank=4)
    >>> adapted(torch.randn(2, 4), experts=torch.tensor([0, 2])).shape
    torch.Size([2, 3])
    """

    def __init__(self, body: nn.Module, adapters: Sequence[Adapter] = ()) -> None:
        super().__init__()
        self.body = clone(body, shared=True)
        self.num_experts = len(adapters)
        self.head_name = f"body.{head_name(body)}".rstrip(".")
        changes: dict[str, dict[int, Change]] = {}  # by parameter and expert
        for expert, adapter in enumerate(adapters):
            for name, change in adapter.changes.items():
                changes.setdefault(name, {})[expert] = change
        refused = not_makeable(self.body)
        kept = {name: own for name, _, own in kept_parameters(self.body)}
        for name, of_experts in changes.items():
            if name in refused:
                raise StateError(
                    f"'{name}' cannot be changed, expected no parameter of a container or an RNN"
                )
            own = kept[name] if name in kept else keep(self.body, name)
            own.set_changes(name, of_experts)
        take_out_norms(self.body)

    @property
    def adapters(self) -> list[Adapter]:
        """The experts' adapters; they share the layers' tensors."""
        adapters = [Adapter() for _ in range(self.num_experts)]
        # Of tied parameters the last name.
        names = {kept: name for name, _, kept in kept_parameters(self.body)}
        for kept, name in names.items():
            for expert, adapter in enumerate(adapters):
                change = kept.change(expert)
                if change is not None:
                    adapter.changes[name] = change
        return adapters

    @torch.inference_mode(False)
    @torch.no_grad()
    def network(self, expert: int, head: nn.Module | None = None) -> nn.Module:
        """Return a plain network that answers as an expert, in eval mode, with that head's weights if one is given."""
        with self._as(expert):
            network = unpacked(self.body).eval()
        return network if head is None else with_head(network, head)

    @contextmanager
    def _as(self, expert: int) -> Iterator[None]:
        """Have the body's layers make their parameters as an expert has them."""
        if not 0 <= expert < max(1, self.num_experts):
            raise ConfigurationError(f"found expert {expert}, expected 0 to {self.num_experts - 1}")
        token = ANSWERING.set(expert)
        try:
            yield
        finally:
            ANSWERING.reset(token)

    def forward(self, *inputs: Any, experts: int | Tensor | None = None, **named: Any) -> Any:
        """Return what the body makes of inputs ``[B, …]`` as an expert, or sample by sample as experts ``[B]``."""
        return self.run(operator.call, *inputs, experts=experts, **named)

    def run(
        self,
        function: Callable[..., Any],
        *inputs: Any,
        experts: int | Tensor | None,
        **named: Any,
    ) -> Any:
        """Return what a function makes of a network and inputs ``[B, …]``, for mixed experts in the batch's order.

        The function is called once for every expert, with a network that answers as that one and its samples. Raises
        StateError where the experts are missing, ConfigurationError where they are neither an index nor indices.
        """
        if self.num_experts == 0:
            experts = 0
        if experts is None:
            raise StateError(
                "found a body with adapters and no expert to answer as, expected one; give experts=, an index or [B]"
            )
        if type(experts) is int:
            with self._as(experts):
                return function(self.body, *inputs, **named)
        first = tensors_in((inputs, named))[0]
        shape = first.shape[:1]
        if (
            not isinstance(experts, Tensor)
            or experts.dtype != torch.int64
            or experts.shape != shape
        ):
            raise ConfigurationError(
                f"found {experts!r:.60} for the experts, expected an index, or indices [{len(first)}], int64"
            )
        indices = experts.to(first.device)
        places = []
        parts = []
        present = torch.unique(indices).tolist()
        for expert in present or [0]:  # of an empty batch any expert will do
            own = (indices == expert).nonzero().flatten()
            take_own = partial(torch.index_select, dim=0, index=own)
            own_inputs, own_named = tree_map_only(Tensor, take_own, (inputs, named))
            with self._as(expert):
                parts.append(function(self.body, *own_inputs, **own_named))
            places.append(own)
        order = torch.cat(places).argsort()
        return tree_map(lambda *outputs: torch.cat(outputs)[order], *parts)


def resident_nbytes(network: nn.Module) -> int:
    """Return the bytes of weights in memory while a network answers, with those of the largest that a layer makes."""
    largest = 0
    for _, layer, kept in kept_parameters(network):
        if kept.experts or not looks_up(layer):
            made = kept.shape.numel() * kept.original.element_size()
            largest = max(largest, made)
    return nbytes([*network.parameters(), *network.buffers()]) + largest


def stored_nbytes(network: nn.Module) -> int:
    """Return the bytes of a network's state in a file, with rounded matrices in as many bits as they have."""
    total = nbytes(stored(network).values())
    for module in network.modules():
        if isinstance(module, Kept) and module.rows is not None:
            total += Rounded(module.rows, module.bits).nbytes - module.rows.nbytes
    return total


def with_adapters(network: nn.Module, adapters: Sequence[Adapter]) -> nn.Module:
    """Return a network, as a body if there are adapters."""
    return Adapted(network, adapters) if adapters else network
