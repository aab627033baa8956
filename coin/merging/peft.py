"""One expert's adapter as a folder that peft loads onto the body."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from coin.errors import ConfigurationError
from coin.networks.adapter import Adapter
from coin.networks.heads import head_name


def save_peft(adapter: Adapter, body: nn.Module, head: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter of a body, and the tensors of a head of its shape, as a DoRA adapter of peft.

    Peft's W ← m ⊙ (W + B A) / ‖W + B A‖, a magnitude m for each output, is the adapter's (W + left right) ⊙ scale with
    m = scale · ‖W + left right‖ (Liu et al., *DoRA*, ICML 2024, arXiv 2402.09353). Biases are peft's ``bias: all``;
    normalisations and the head are kept whole. Raises ConfigurationError for other layers than Linear and Conv2d.
    """
    head_place = head_name(body)
    changed = adapter.applied_to(body)
    tensors = {f"{head_place}.{name}": tensor for name, tensor in head.items()}
    whole = {head_place}  # the modules that are kept whole
    ranks: dict[str, int] = {}
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
        matrix = parameter.flatten(1)  # [O, K]
        outputs, inputs = matrix.shape
        left, right = change.factors(outputs, inputs)  # [O, r], [r, K]
        rank = left.shape[1]
        if rank == 0:
            raise ConfigurationError(
                f"found no correction of '{name}', expected rank 1 at least, as peft's LoRA has"
            )
        ranks[place] = rank
        magnitude = matrix.norm(dim=1)
        if change.scale is not None:
            signs = change.scale.float().sign().flatten()
            magnitude = signs * magnitude
        kernel = parameter.shape[2:]  # of a convolution
        ones = [1] * len(kernel)
        tensors[f"{place}.lora_A.weight"] = right.reshape(rank, *parameter.shape[1:])
        tensors[f"{place}.lora_B.weight"] = left.reshape(outputs, rank, *ones)
        tensors[f"{place}.lora_magnitude_vector"] = (
            magnitude.view(1, -1, *ones) if kernel else magnitude
        )
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        f"base_model.model.{name}": tensor.detach().contiguous() for name, tensor in tensors.items()
    }
    save_file(kept, folder / "adapter_model.safetensors")
    options = {
        "peft_type": "LORA",
        "use_dora": True,
        "bias": "all",
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": list(ranks),
        # Full names: peft takes every module whose name ends with one of these, `pre_classifier` by `classifier`.
        "modules_to_save": sorted(f"base_model.model.{place}" for place in whole),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(options, indent=2), encoding="utf-8")


def _check_adapted(name: str, layer: nn.Module) -> None:
    """Raise ConfigurationError for a layer that peft's LoRA does not adapt as `coin` does."""
    if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) > 1:
        raise ConfigurationError(
            f"found '{name}' of a {type(layer).__name__}, which peft's LoRA does not adapt"
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
