"""The training options shared by ``coin fit`` and ``coin run``, and their effect on a network."""

import difflib
import inspect
from argparse import ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from coin.core.choices import check_number, is_list_of_names
from coin.errors import ConfigurationError
from coin.networks.heads import head_name, without_head
from coin.networks.running import full_precision

HEAD = "head"  # the pattern that stands for a network's head, whatever it is called

# The name of a class, or {class_path: …, init_args: {…}}. Of plain values, which a step's key holds; jsonargparse would
# make objects of `dict[str, Any]`.
ClassSpec: TypeAlias = str | dict | None  # type: ignore[type-arg]

SGD: dict[str, Any] = {
    "class_path": "torch.optim.SGD",
    "init_args": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4},
}
"""The optimiser if none is given."""


class SchedulerCallable(Protocol):
    """Makes the learning-rate schedule of an optimiser, from those of these arguments that it takes."""

    def __call__(self, optimizer: Optimizer, *, max_lr: list[float], total_steps: int, T_max: int) -> LRScheduler:
        """Return the schedule: the optimiser's rates are its highest, the run's number of steps is its length."""


class OneCycle(OneCycleLR):
    """Torch's one cycle with the optimiser's momentum, and after the last step the rate that it ended with.

    Source: Smith and Topin, *Super-convergence* (2018).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | list[float],
        total_steps: int,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
    ) -> None:
        super().__init__(optimizer, max_lr, total_steps, None, None, pct_start, anneal_strategy, cycle_momentum=False)  # type: ignore[arg-type]

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each group of parameters."""
        return self.get_last_lr() if self.last_epoch >= self.total_steps else super().get_lr()


@dataclass(frozen=True)
class Recipe:
    """The training options of ``coin fit``'s `Expert` and of an experiment's ``expert`` and ``base``.

    Args:
        optimizer: A class of `torch.optim`, such as ``AdamW``, or any other's ``class_path`` and ``init_args``; by
            default SGD with momentum 0.9.
        lr: The optimiser's learning rate, in the place of that in its ``init_args``.
        momentum: The optimiser's momentum, likewise.
        weight_decay: The optimiser's weight decay, likewise.
        lr_scheduler: A class of `torch.optim.lr_scheduler`, given as the optimiser's, which steps with it; its
            ``total_steps``, ``T_max`` and ``max_lr`` are the run's and the optimiser's own. None is a constant rate.
        head_lr: The head's learning rate, by default the optimiser's. The schedule scales both.
        label_smoothing: The share of the target spread over all classes, in [0, 1).
        l2_sp: The factor α of the penalty ½α‖θ − θ₀‖² towards the shared initialisation θ₀, over all trained parameters
            but the head's. Source: Li et al., *Explicit inductive bias for transfer learning* (ICML 2018), L²-SP.
        freeze_batchnorm: Whether BatchNorm layers stay in eval mode: their running statistics are fixed, their weights
            and biases train.
        trainable: Which parameters train, by glob patterns over their names, such as ``layer4.*``, or ``head``,
            whatever the head is called. None trains all. See `freeze_batchnorm` for BatchNorm.
    """

    optimizer: ClassSpec = None
    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    lr_scheduler: ClassSpec = "coin.modules.recipe.OneCycle"
    head_lr: float | None = None
    label_smoothing: float = 0.0
    l2_sp: float = 0.0
    freeze_batchnorm: bool = False
    trainable: list[str] | None = None

    def __post_init__(self) -> None:  # overrides bring plain values, which no parser has seen
        for name, home, usual in (("optimizer", "optim", SGD), ("lr_scheduler", "optim.lr_scheduler", None)):
            given = getattr(self, name)
            object.__setattr__(self, name, usual if given is None else _spec(name, given, f"torch.{home}"))
        for name in ("lr", "head_lr"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0.0, strict=True)
        check_number("l2_sp", self.l2_sp, low=0.0)
        check_number("label_smoothing", self.label_smoothing, low=0.0, high=1.0)
        if not isinstance(self.freeze_batchnorm, bool):
            raise ConfigurationError(f"found freeze_batchnorm={self.freeze_batchnorm!r}, expected true or false")
        if self.trainable is not None and not is_list_of_names(self.trainable):
            raise ConfigurationError(f"found trainable={self.trainable!r}, expected a list of glob patterns or null")
        try:  # on a parameter of its own: a class or an option that there is not is refused before anything is trained
            self.make_scheduler(self.make_optimizer([nn.Parameter(torch.zeros(1, 1))]), 100)
        except (ArgumentError, TypeError, ValueError) as error:
            specs: list[Any] = [self.optimizer, self.lr_scheduler]
            reason = " ".join(str(error).split()).rpartition("callable class: ")[2].partition(" Got value")[0]
            told = "found optimizer {} and lr_scheduler {}".format(*(each and each["class_path"] for each in specs))
            raise ConfigurationError(f"{told}, not made: {reason:.300}; change class_path or init_args") from error

    def make_optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """Return the optimiser of parameters, or of groups of them."""
        own = {name: getattr(self, name) for name in ("lr", "momentum", "weight_decay")}
        short = {name: value for name, value in own.items() if value is not None}
        given: Any = self.optimizer
        spec = {**given, "init_args": {**given["init_args"], **short}}
        return _maker("optimizer", OptimizerCallable, spec)(parameters)  # type: ignore[no-any-return]

    def make_scheduler(self, optimizer: Optimizer, steps: float) -> LRScheduler | None:
        """Return the schedule of a run of this many steps; ConfigurationError where a schedule's length is infinite."""
        spec: Any = self.lr_scheduler
        if spec is None:
            return None
        make = _maker("lr_scheduler", SchedulerCallable, spec)
        known = {"max_lr": [group["lr"] for group in optimizer.param_groups], "total_steps": steps, "T_max": steps}
        given = inspect.signature(_class_of(make)).parameters.keys() & known.keys()
        if steps == float("inf") and given - {"max_lr"}:
            told = f"found lr_scheduler={spec['class_path']} for a run of no known length, expected its number of steps"
            raise ConfigurationError(f"{told}; set trainer.max_epochs or trainer.max_steps, or lr_scheduler=null")
        return make(optimizer, **{name: known[name] for name in given})  # type: ignore[no-any-return]


def _maker(name: str, kind: Any, spec: Mapping[str, Any]) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=kind)
    return parser.instantiate(parser.parse_object({name: spec}))[name]


def _class_of(given: Any) -> Any:
    """Return a class, or the one that jsonargparse or `functools.partial` has given arguments; else None."""
    named = (given.func, *given.args) if isinstance(given, partial) else (given,)
    return next(filter(inspect.isclass, named), None)


def _spec(name: str, given: Any, home: str) -> dict[str, Any]:
    """Return a class as ``class_path`` and ``init_args``, one that is given by its name as one of `home`."""
    if (kind := _class_of(given)) is not None:
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": getattr(given, "keywords", {})}
    spec = {"class_path": given} if isinstance(given, str) else given
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str):
        raise ConfigurationError(f"found {name}={given!r}, expected the name of a class of {home}, or its class_path")
    path = spec["class_path"]
    return {"init_args": {}, **spec, "class_path": path if "." in path else f"{home}.{path}"}


def trainable_names(network: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Return names that match globs or `HEAD`, all by default, no frozen head's; ConfigurationError for no match."""
    names = [name for name, _ in network.named_parameters()]
    if getattr(network, "frozen_head", False):
        names = without_head(network, names)
        if patterns is not None and HEAD in patterns:
            told = f"found trainable pattern '{HEAD}' and a {type(network).__name__}"
            raise ConfigurationError(f"{told}, whose head is computed from class names and not trained; leave it out")
    if patterns is None:
        return names
    found: set[str] = set()
    for pattern in patterns:
        glob = f"{head_name(network)}.*" if pattern == HEAD else pattern
        matching = {name for name in names if fnmatchcase(name, glob)}
        if not matching:
            told = f"found trainable pattern '{pattern}', which matches no parameter of {type(network).__name__}"
            near = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
            raise ConfigurationError(f"{told}; the nearest names are {near} (or '{HEAD}'; 'layer.*' is a whole layer)")
        found |= matching
    return [name for name in names if name in found]


def parameter_groups(network: nn.Module, head_lr: float | None) -> list[dict[str, Any]]:
    """Return the optimiser's parameter groups: one, or two if the head, which must be trained, has its own rate."""
    trained = {name: each for name, each in network.named_parameters() if each.requires_grad}
    if head_lr is None:
        return [{"params": list(trained.values())}]
    body = without_head(network, list(trained))
    own = [each for name, each in trained.items() if name not in body]
    if not own:
        advice = f"add '{HEAD}' to trainable, or leave head_lr out"
        raise ConfigurationError(f"found head_lr={head_lr} and a head that is not trained; {advice}")
    groups: list[dict[str, Any]] = [{"params": [trained[name] for name in body]}] if body else []
    return [*groups, {"params": own, "lr": head_lr}]


def squared_distance(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
    """Return ‖θ − θ₀‖², a scalar, over the tensors in `start`; in float32 at least."""
    moved = (full_precision(parameters[name]) - full_precision(tensor) for name, tensor in start.items())
    return torch.stack([difference.square().sum() for difference in moved]).sum()
