"""Experts' adapters as folders that peft loads onto the body."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from coin.core.batches import Batch
from coin.core.devices import device_of
from coin.errors import ConfigurationError
from coin.files.tensors import check_layout
from coin.merging.adapter_fit import AdapterFit
from coin.merging.body import FitOptions, Folded, fit_body
from coin.merging.experts import Experts
from coin.merging.units import Unit
from coin.networks.adapter import Adapter, AdapterOptions, Change
from coin.networks.batchnorm import batchnorms
from coin.networks.calling import as_input, clone, logits_of
from coin.networks.delta import check_range
from coin.networks.guard import evaluating
from coin.networks.heads import head_name, linear_head, with_rows
from coin.networks.weights import to_compute

ABSENT = -1e4  # a logit that never wins, and that float16 holds
SEQUENCE_HEADS = ("classifier", "score")  # the heads that peft's class for SEQ_CLS looks for


def save_peft(
    adapter: Adapter,
    body: nn.Module,
    head: Mapping[str, Tensor],
    folder: Path,
    inputs: Batch,
    base: str | None = None,
    task_type: str | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Write an adapter of a body, and the tensors of an expert's head, as a plain LoRA that peft loads.

    It has ``bias: none`` and one rank, so that batches of several adapters take it. The head is kept whole
    (``modules_to_save``), with as many outputs as the body's: classes that the expert lacks have logits of `ABSENT`.

    Args:
        adapter: The adapter, fitted with ``scales: false``.
        body: The body.
        head: The tensors of a Linear head by their names in it.
        folder: Where `adapter_config.json`, `adapter_model.safetensors` and, of labels, `labels.json` are written.
        inputs: Any that the body can be called with.
        base: peft's `base_model_name_or_path`.
        task_type: peft's, such as SEQ_CLS.
        labels: The expert's classes in the order of its outputs.

    Raises ConfigurationError for what peft's LoRA has no place for, before anything is written.
    """
    head_place = head_name(body)
    whole = _whole_modules(body, head_place, task_type)
    corrections: dict[str, Change] = {}  # by the layer
    for name, change in adapter.changes.items():
        if change.scale is not None or change.shift is not None:
            raise ConfigurationError(
                f"found a scale or bias of '{name}', expected plain LoRA for peft; fit adapters with scales: false"
            )
        place = name.removesuffix(".weight")
        if change.left is not None and place not in whole:
            _check_adapted(name, body)
            corrections[place] = change
    if not corrections:
        raise ConfigurationError(
            "found adapters without corrections, expected rank 1 at least, as peft's LoRA has"
        )
    _check_called(body, [*corrections], inputs)
    changed = adapter.applied_to(body)
    tensors: dict[str, Tensor] = {}
    for place in whole:
        for name, tensor in changed.get_submodule(place).state_dict().items():
            tensors[f"{place}.{name}"] = tensor
    for name, tensor in _padded(head, len(linear_head(body).weight)).items():
        tensors[f"{head_place}.{name}"] = tensor
    rank = max(len(change.left) for change in corrections.values() if change.left is not None)
    for place, change in corrections.items():
        weight = body.get_parameter(f"{place}.weight")
        for part, tensor in _of_layer(change, weight, rank).items():
            tensors[f"{place}.{part}"] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        f"base_model.model.{name}": tensor.detach().contiguous() for name, tensor in tensors.items()
    }
    save_file(kept, folder / "adapter_model.safetensors")
    options = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets([*corrections], body),
        "modules_to_save": [head_place],
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(options, indent=2), encoding="utf-8")
    if labels:
        named = {"id2label": dict(enumerate(labels))}
        (folder / "labels.json").write_text(json.dumps(named, indent=2), encoding="utf-8")


def _whole_modules(body: nn.Module, head_place: str, task_type: str | None) -> list[str]:
    """Return the modules that peft keeps whole with the head: all whose names end so, `pre_classifier` by `classifier`.

    Raises ConfigurationError where one is more than a layer, within which peft would look for layers to adapt.
    """
    others = SEQUENCE_HEADS if task_type == "SEQ_CLS" else ()
    endings = (head_place, *others)
    places = []
    for name, layer in body.named_modules(remove_duplicate=False):
        if not name.endswith(endings):
            continue
        if next(layer.children(), None) is not None:
            raise ConfigurationError(
                f"found '{name}' of several layers, whose name ends as the head's, '{head_place}', expected no such "
                "names for peft; rename one of them, or leave out --peft"
            )
        places.append(name)
    return places


def _padded(head: Mapping[str, Tensor], outputs: int) -> dict[str, Tensor]:
    """Return a head's tensors with so many outputs: the logits of classes that it lacks are `ABSENT`."""
    own = len(head["weight"])
    if own < outputs and "bias" not in head:
        raise ConfigurationError(
            f"found a head of {own} classes without a bias for a body of {outputs}, expected as many classes for peft; "
            "leave out --peft, which writes the expert as one network"
        )
    fill = {"weight": 0.0, "bias": ABSENT}
    return {name: with_rows(tensor, outputs, fill[name]) for name, tensor in head.items()}


def _of_layer(change: Change, parameter: Tensor, rank: int) -> dict[str, Tensor]:
    """Return peft's tensors of a layer with this weight: the factors padded with zeros to this rank."""
    outputs, inputs = parameter.flatten(1).shape
    left, right = change.factors(outputs, inputs)  # [r, O], [r, K]
    ones = [1] * (parameter.ndim - 2)  # of a convolution's kernel
    return {
        "lora_A.weight": with_rows(right, rank).reshape(rank, *parameter.shape[1:]),
        "lora_B.weight": with_rows(left, rank).T.reshape(outputs, rank, *ones),
    }


def _targets(names: list[str], body: nn.Module) -> list[str] | str:
    """Return peft's `target_modules`: the names, or where another layer's name ends with one a pattern of them all."""
    others = {name for name, _ in body.named_modules()} - set(names)
    endings = tuple(f".{name}" for name in names)
    if any(name.endswith(endings) for name in others):
        return "|".join(map(re.escape, names))
    return names


class _Unrounded(Change):
    """A change whose factors are as they were fitted: leftᵀ [r, O] and right [r, K]."""

    def factors(
        self, rows: int, columns: int, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Return leftᵀ and right."""
        assert self.left is not None
        assert self.right is not None
        return self.left.to(dtype), self.right.to(dtype)


class LoraFit(AdapterFit):
    """Fits plain LoRA as `AdapterFit` does, in float32 as peft keeps it: nothing is rounded."""

    def correction(self, unit: Unit, vectors: Tensor, best: Tensor) -> Change:
        """Return the correction V Vᵀ B as it is."""
        right = unit.from_columns(vectors.T @ best)
        change = _Unrounded(left=vectors.T.float(), right=right.float())
        for factor in change.tensors.values():
            check_range(factor, torch.float32)
        return change


def extract_lora(
    network: nn.Module,
    base: nn.Module,
    samples: Iterable[Any],
    rank: int,
    folder: Path | str,
) -> nn.Module:
    """Write a fully fine-tuned network as a plain LoRA of its base, a folder that peft loads; return what that gives.

    The difference of every ungrouped linear map from the base's is cut to rank r where it matters to the inputs that
    the base with the adapter so far has (`coin.merging.adapter_fit.AdapterFit`); peft's own ``convert_to_lora`` cuts
    the difference's singular value decomposition. The head is kept whole. Biases, normalisations and grouped
    convolutions are the base's: what fine-tuning changed of these is lost.

    Args:
        network: The network.
        base: What it was fine-tuned from, with a head of the same shape.
        samples: Batches of inputs like those it is to answer, without labels: some 200 samples.
        rank: r.
        folder: Where the adapter is written.

    Raises ConfigurationError for a network with BatchNorm, whose statistics a LoRA has no place for, or
    `nn.MultiheadAttention`; StateError for another head than the base's.

    >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
    >>> network = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
    >>> made = coin.extract_lora(network, base, [torch.randn(200, 64)], rank=4, folder="lora")
    >>> int(torch.linalg.matrix_rank(made[0].weight - base[0].weight, rtol=1e-3))
    4
    """
    if batchnorms(base):
        raise ConfigurationError(
            f"found BatchNorms in {type(base).__name__}, expected a network without, such as a transformer; "
            "keep a body with adapters, coin.fit_adapters(base, [network], [samples])"
        )
    head = linear_head(network)
    check_layout(linear_head(base).state_dict(), head.state_dict(), "the network's head")
    base = clone(base).to(device_of(network))
    experts = Experts(to_compute([network], device_of(network)), calibration=[samples])
    label = "extract_lora"
    start = Folded.of(base, experts, label)
    options = FitOptions(adapters=AdapterOptions(rank, scales=False))
    with torch.inference_mode(False):
        _, (adapter,) = fit_body(start, experts, [1.0], options, label, adapter_fit=LoraFit)
    few = experts.pooled.inputs(torch.tensor([0]))
    save_peft(adapter, base, head.state_dict(), Path(folder), few)
    return adapter.applied_to(base, head)


def _check_adapted(name: str, body: nn.Module) -> None:
    """Raise ConfigurationError for the weight of a layer that peft's LoRA does not adapt as `coin` does."""
    layer = body.get_submodule(name.rpartition(".")[0])
    if isinstance(layer, nn.Linear):
        return
    if not isinstance(layer, nn.Conv2d):
        raise ConfigurationError(
            f"found '{name}' of a {type(layer).__name__}, which peft's LoRA does not adapt, expected Linear layers and "
            "Conv2d; take attention of Linear layers, as timm's and Hugging Face's, or leave out --peft"
        )
    # Peft's own convolutions take the layer's kernel, stride and padding alone.
    has_plain_dilation = layer.dilation == (1, 1) or layer.kernel_size == (1, 1)
    if layer.padding_mode != "zeros" or not has_plain_dilation:
        raise ConfigurationError(
            f"found '{name}' of a Conv2d with padding_mode {layer.padding_mode!r} and dilation {layer.dilation}, which "
            "peft's LoRA leaves out of its own convolutions; leave out --peft, which writes the expert as one network"
        )


def _check_called(body: nn.Module, places: Sequence[str], inputs: Batch) -> None:
    """Raise ConfigurationError for a layer that does not run: what reads its weight would miss peft's update."""
    called: set[nn.Module] = set()
    with ExitStack() as hooks, evaluating(body, gradients=False):
        for place in places:
            layer = body.get_submodule(place)
            hooks.enter_context(layer.register_forward_hook(lambda own, *_: called.add(own)))
        logits_of(body, as_input(inputs, body))
    for place in places:
        if body.get_submodule(place) not in called:
            raise ConfigurationError(
                f"found '{place}', whose weight is read without calling the layer, as torchvision's Swin does, "
                "expected layers that are called, beside which peft's LoRA runs; leave out --peft, which writes the "
                "expert as one network"
            )
