"""Experts' adapters as folders that peft loads onto the body."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from coin.core.devices import device_of
from coin.errors import ConfigurationError
from coin.merging.passes import fit_adapters
from coin.networks.adapter import Adapter
from coin.networks.batchnorm import batchnorms
from coin.networks.calling import clone
from coin.networks.heads import head_name
from coin.networks.kept import Change


def save_peft(
    adapter: Adapter,
    body: nn.Module,
    head: Mapping[str, Tensor],
    folder: Path,
    base: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write an adapter of a body, and the tensors of a head of its shape, as an adapter of peft.

    Without scales it is a plain LoRA, with ``bias: none``, all of one rank: batches of several adapters take it. With
    them it is a DoRA: peft's W ← m ⊙ (W + B A) / ‖W + B A‖, a magnitude m for each output, is the adapter's
    (W + left right) ⊙ scale with m = scale · ‖W + left right‖ (Liu et al., *DoRA*, ICML 2024, arXiv 2402.09353); biases
    are peft's ``bias: all``, and normalisations are kept whole. The head is kept whole in both.

    Args:
        adapter: The adapter.
        body: The body.
        head: The head's tensors by their names in it.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` are written.
        base: peft's `base_model_name_or_path`.
        task_type: peft's, such as SEQ_CLS.

    Raises ConfigurationError for other layers than Linear and Conv2d, before anything is written.
    """
    _check_attention(body)
    head_place = head_name(body)
    changed = adapter.applied_to(body)
    tensors = {f"{head_place}.{name}": tensor for name, tensor in head.items()}
    whole = {head_place}  # the modules that are kept whole
    targets: list[str] = []
    parts = adapter.changes.values()
    is_dora = any(change.scale is not None or change.shift is not None for change in parts)
    rank = max((len(change.left) for change in parts if change.left is not None), default=0)
    if rank == 0:
        raise ConfigurationError(
            "found adapters without corrections, expected rank 1 at least, as peft's LoRA has"
        )
    for name, change in adapter.changes.items():
        place, _, role = name.rpartition(".")
        layer = body.get_submodule(place)
        parameter = changed.get_parameter(name)
        if isinstance(layer, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d):
            whole.add(place)
            for own, tensor in changed.get_submodule(place).state_dict().items():
                tensors[f"{place}.{own}"] = tensor
            continue
        _check_adapted(name, layer)
        if role == "bias":
            tensors[f"{place}.base_layer.bias"] = parameter
            continue
        targets.append(place)
        for part, tensor in _of_layer(change, parameter, rank, is_dora).items():
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
        "use_dora": is_dora,
        "bias": "all" if is_dora else "none",
        "target_modules": _targets(targets, body),
        "modules_to_save": sorted(_name_of_whole(place, body) for place in whole),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(options, indent=2), encoding="utf-8")


def _of_layer(change: Change, parameter: Tensor, rank: int, is_dora: bool) -> dict[str, Tensor]:
    """Return peft's tensors of a layer, given its changed weight: the factors padded with zeros to this rank."""
    matrix = parameter.flatten(1)  # [O, K]
    outputs, inputs = matrix.shape
    left, right = change.factors(outputs, inputs)  # [O, r], [r, K]
    missing = rank - left.shape[1]
    left = torch.cat([left, left.new_zeros(outputs, missing)], 1)
    right = torch.cat([right, right.new_zeros(missing, inputs)])
    kernel = parameter.shape[2:]  # of a convolution
    ones = [1] * len(kernel)
    found = {
        "lora_A.weight": right.reshape(rank, *parameter.shape[1:]),
        "lora_B.weight": left.reshape(outputs, rank, *ones),
    }
    if is_dora:
        signs = change.scales().sign().flatten().to(matrix)
        magnitude = signs * matrix.norm(dim=1)
        found["lora_magnitude_vector"] = magnitude.view(1, -1, *ones) if kernel else magnitude
    return found


def _targets(names: list[str], body: nn.Module) -> list[str] | str:
    """Return peft's `target_modules`: the names, or where another layer's name ends with one a pattern of them all."""
    others = {name for name, _ in body.named_modules()} - set(names)
    endings = tuple(f".{name}" for name in names)
    if any(name.endswith(endings) for name in others):
        return "|".join(map(re.escape, names))
    return names


def _name_of_whole(place: str, body: nn.Module) -> str:
    """Return the name by which peft keeps one module whole, its own where no other module's name ends with it.

    Peft takes every module whose name ends so, `pre_classifier` by `classifier`. vLLM reads `classifier` and `score`,
    and refuses full names.
    """
    names = [name for name, _ in body.named_modules(remove_duplicate=False)]
    is_alone = not any(name.endswith(place) for name in names if name != place)
    return place if is_alone else f"base_model.model.{place}"


def extract_lora(
    network: nn.Module,
    base: nn.Module,
    samples: Iterable[Any],
    rank: int,
    folder: Path | str,
) -> Adapter:
    """Write a fully fine-tuned network as a plain LoRA of its base, a folder that peft loads, and return the adapter.

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
    `nn.MultiheadAttention`, and for another head than the base's.

    >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
    >>> network = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
    >>> adapter = coin.extract_lora(network, base, [torch.randn(200, 64)], rank=4, folder="lora")
    >>> adapter.nbytes  # 4 directions of 64 and of 32 values in 4 bits, with a scale each
    208
    """
    if batchnorms(base):
        raise ConfigurationError(
            f"found BatchNorms in {type(base).__name__}, expected a network without, such as a transformer; "
            "keep a body with adapters, coin.fit_adapters(base, [network], [samples])"
        )
    _check_attention(base)
    head = network.get_submodule(head_name(network)).state_dict()
    found = {name: list(tensor.shape) for name, tensor in head.items()}
    own = base.get_submodule(head_name(base)).state_dict()
    expected = {name: list(tensor.shape) for name, tensor in own.items()}
    if found != expected:
        raise ConfigurationError(f"found a head {found}, expected the base's, {expected}")
    base = clone(base).to(device_of(network))
    adapted = fit_adapters(base, [network], [samples], rank=rank, scales=False)
    (adapter,) = adapted.adapters
    save_peft(adapter, base, head, Path(folder))
    return adapter


def _check_attention(body: nn.Module) -> None:
    """Raise ConfigurationError for `nn.MultiheadAttention`, whose weights peft's LoRA does not adapt one by one."""
    for name, layer in body.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            raise ConfigurationError(
                f"found '{name}', an nn.MultiheadAttention, expected attention of Linear layers, as timm's and "
                "Hugging Face's, for peft"
            )


def _check_adapted(name: str, layer: nn.Module) -> None:
    """Raise ConfigurationError for a layer that peft's LoRA does not adapt as `coin` does."""
    is_grouped = getattr(layer, "groups", 1) > 1
    if is_grouped or not isinstance(layer, nn.Linear | nn.Conv2d):
        advice = "; fit adapters with scales: false, which leave grouped convolutions to the body"
        raise ConfigurationError(
            f"found '{name}' of a {type(layer).__name__}, which peft's LoRA does not adapt"
            f"{advice if is_grouped else ''}"
        )
    if isinstance(layer, nn.Linear):
        return
    # Peft's own convolutions take the layer's kernel, stride and padding alone.
    has_plain_dilation = layer.dilation == (1, 1) or layer.kernel_size == (1, 1)
    if layer.padding_mode != "zeros" or not has_plain_dilation:
        raise ConfigurationError(
            f"found '{name}' of a Conv2d with padding_mode {layer.padding_mode!r} and dilation {layer.dilation}, which "
            "peft's LoRA leaves out of its own convolutions; leave out --peft, which writes the expert as one network"
        )
