"""Two experts of a small network of any family, with their tasks' calibration samples, in float64.

The families are in timm.yaml: an architecture or a class of `timm.models`, the images' size, and options; and in
hugging_face.yaml: what its configuration is called, the images' size, which is 0 for texts, and its entries.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
import yaml
from timm.layers import GatedMlp, GroupNormAct
from timm.models import (
    byobnet,
    inception_next,
    maxxvit,
    metaformer,
    mlp_mixer,
    mobilevit,
    mvitv2,
    regnet,
)
from timm.models._efficientnet_builder import decode_arch_def
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CLASSES = 3
SAMPLES = (
    10  # of each task; the held-out fifth of all is then the same whatever the order of the experts
)
TOKENS, LENGTH, PADDING, END = 30, 7, 0, 2


def _maxxvit(*kinds: str) -> maxxvit.MaxxVitCfg:
    windows = {"window_size": (2, 2), "grid_size": (2, 2)} if "M" in kinds else {}
    attention = maxxvit.MaxxVitTransformerCfg(dim_head=4, **windows)
    return maxxvit.MaxxVitCfg((8, 16), (1, 1), kinds, 8, transformer_cfg=attention)


_REPVGG = tuple(byobnet.ByoBlockCfg(type="rep", d=1, c=width, s=2, gs=0) for width in (4, 8))
_MOBILEVIT = (
    mobilevit._inverted_residual_block(d=1, c=8, s=2),
    mobilevit._mobilevit_block(d=1, c=8, s=2, transformer_dim=8, transformer_depth=1),
)
_OBJECTS: dict[str, dict[str, Any]] = {
    "resnetv2": {"norm_layer": partial(GroupNormAct, num_groups=2)},
    "mobilenetv3": {
        "block_args": decode_arch_def(
            [["ds_r1_k3_s2_e1_c8_se0.25_nre"], ["ir_r2_k5_s2_e2_c8_se0.25"]]
        ),
        "act_layer": nn.Hardswish,
    },
    "poolformer": {"norm_layers": metaformer.GroupNorm1},
    "caformer": {
        "token_mixers": [metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
        "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
    },
    "maxvit": {"cfg": _maxxvit("M", "M")},
    "coatnet": {"cfg": _maxxvit("C", "T")},
    "repvgg": {"cfg": byobnet.ByoModelCfg(_REPVGG, stem_type="rep", stem_chs=4)},
    "mobilevit": {
        "cfg": byobnet.ByoModelCfg(
            _MOBILEVIT, "", "3x3", stem_chs=8, stem_pool="", act_layer="silu", num_features=16
        )
    },
    "regnet": {
        "cfg": regnet.RegNetCfg(8, w0=8, wa=8.0, wm=2.0, group_size=4, se_ratio=0.25, stem_width=4)
    },
    "gmlp": {"block_layer": mlp_mixer.SpatialGatingBlock, "mlp_layer": GatedMlp},
    "resmlp": {"block_layer": mlp_mixer.ResBlock, "norm_layer": mlp_mixer.Affine},
    "inception_next": {"token_mixers": inception_next.InceptionDWConv2d},
    "mvitv2": {
        "cfg": mvitv2.MultiScaleVitCfg(
            (1, 1), (8, 16), (1, 2), stride_q=((1, 1), (2, 2)), stride_kv_adaptive=(2, 2)
        )
    },
}


def _read(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(
        (Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8")
    )
    return {f"{name}/{family}": entry for family, entry in read.items()}


_TABLE = _read("timm") | _read("hugging_face")
FAMILIES = list(_TABLE)

Batch = Tensor | dict[str, Tensor]


def call(network: Any, batch: Batch) -> Tensor:
    """Return a network's logits [B, C]: timm's have a tensor, those of Hugging Face tensors by name."""
    logits: Tensor = network(batch) if isinstance(batch, Tensor) else network(**batch).logits
    return logits


@dataclass
class Case:
    """Two experts of one family, a copy of the first, the initialisation they started from and their tasks' samples."""

    initial: nn.Module
    experts: list[nn.Module]
    untouched: nn.Module
    tasks: list[list[Batch]]

    def answers(self, network: nn.Module, batch: Batch | None = None) -> Tensor:
        """Return a network's logits [B, C], of all calibration samples by default."""
        batches = [batch] if batch is not None else [each for task in self.tasks for each in task]
        with torch.no_grad():
            return torch.cat([call(network, each) for each in batches])


def make_case(family: str) -> Case:
    torch.manual_seed(0)
    is_timm = family.startswith("timm/")
    network = (_timm if is_timm else _hugging_face)(family).double()
    _move(network, 1.0, 0.1)  # so that no layer that starts at zero hides others
    draw = _images if is_timm else _named
    tasks = [
        [draw(_TABLE[family][1], count, scale) for count in (8, SAMPLES - 8)]
        for scale in (1.0, 0.6)
    ]
    case = Case(network, [], network, tasks)
    for norm in _norms(network):
        norm.reset_running_stats()
        norm.momentum = None  # its statistics are the mean over these batches
    network.train()
    case.answers(network)
    network.eval()
    for _ in tasks:
        case.experts.append(deepcopy(network))
        _move(case.experts[-1], 0.1, 0.05)
    case.untouched = deepcopy(case.experts[0])
    return case


def _timm(family: str) -> nn.Module:
    name, _, options = _TABLE[family]
    # Constructors want tuples, and take entries out of what they are given.
    options = {key: _tuples(value) for key, value in options.items()} | deepcopy(
        _OBJECTS.get(family[5:], {})
    )
    module, _, kind = name.rpartition(".")
    if module:
        return getattr(import_module(f"timm.models.{module}"), kind)(num_classes=CLASSES, **options)
    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _hugging_face(family: str) -> nn.Module:
    name, size, entries = _TABLE[family]
    configuration = getattr(transformers, f"{name}Config")(**entries)
    configuration.num_labels = CLASSES
    kind = "ForImageClassification" if size else "ForSequenceClassification"
    network: nn.Module = getattr(transformers, name + kind)(configuration)
    return network


def _move(network: nn.Module, matrices: float, vectors: float) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            size = matrices * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else vectors
            parameter += size * torch.randn_like(parameter)
        for norm in _norms(network):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean += (
                vectors * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            )
            norm.running_var *= (vectors * torch.randn_like(norm.running_var)).exp()


def _norms(network: nn.Module) -> list[_BatchNorm]:
    return [
        each
        for each in network.modules()
        if isinstance(each, _BatchNorm) and each.running_mean is not None
    ]


def _images(size: int, count: int, scale: float) -> Tensor:
    return torch.randn(count, 3, size, size).double() * scale + (1 - scale)


def _named(size: int, count: int, scale: float) -> dict[str, Tensor]:
    if size:
        return {"pixel_values": _images(size, count, scale)}
    tokens = torch.randint(END + 1, int(TOKENS * scale), (count, LENGTH))
    lengths = torch.randint(3, LENGTH + 1, (count,))
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    tokens[torch.arange(count), lengths - 1] = END  # where a family asks for one
    return {"input_ids": tokens * mask + PADDING * (1 - mask), "attention_mask": mask}
