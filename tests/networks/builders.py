"""Two experts of a small network of any family, with their tasks' calibration samples, in float64.

The families are in timm.yaml: an architecture or a class of `timm.models`, the images' size, and options; and in
hugging_face.yaml: what its configuration is called, the images' size, which is 0 for texts, and its entries.
"""

from copy import deepcopy
from importlib import import_module
from pathlib import Path

import timm
import torch
import transformers
import yaml

from coin.networks.batchnorm import batchnorms, recalibrate
from coin.networks.calling import logits_of

CLASSES = 3
# Samples of each task's batches; the held-out fifth of all is then the same whatever the order of the experts.
FIRST, SECOND = 8, 2
TOKENS, LENGTH, PADDING, END = 30, 7, 0, 2
FAMILIES = {}
for library in ("timm", "hugging_face"):
    table = yaml.safe_load(Path(__file__).with_name(f"{library}.yaml").read_text())
    FAMILIES |= {f"{library}/{family}": entry for family, entry in table.items()}


class Case:
    """Two experts of one family, the initialisation they started from and their tasks' samples."""

    def __init__(self, family):
        torch.manual_seed(0)
        is_timm = family.startswith("timm/")
        build, draw = (_timm, _images) if is_timm else (_hugging_face, _named)
        name, size, options = FAMILIES[family]
        self.initial = build(name, size, options).double()
        _move(self.initial, 1.0, 0.1)  # so that no layer that starts at zero hides others
        self.tasks = []
        for scale in (1.0, 0.6):
            self.tasks.append([draw(size, count, scale) for count in (FIRST, SECOND)])
        recalibrate(self.initial, self.batches)
        self.initial.eval()
        self.experts = [deepcopy(self.initial) for _ in self.tasks]
        for expert in self.experts:
            _move(expert, 0.1, 0.05)

    @property
    def batches(self):
        first, second = self.tasks
        return first + second

    @torch.no_grad()
    def answers(self, network):
        """Return a network's logits [B, C] of all calibration samples."""
        return torch.cat([logits_of(network, batch) for batch in self.batches])


def _timm(name, _, options):
    # Constructors take entries out of what they are given.
    options = {key: _resolved(value) for key, value in options.items()}
    if "." in name:
        return _object(name)(num_classes=CLASSES, **options)
    return timm.create_model(name, num_classes=CLASSES, **options)


def _resolved(value):
    """Return a value of timm.yaml: lists are tuples, dotted names objects, those with a mapping calls of them."""
    if isinstance(value, list):
        return tuple(map(_resolved, value))
    if isinstance(value, dict):
        ((name, options),) = value.items()
        return _object(name)(**{key: _resolved(each) for key, each in options.items()})
    return _object(value) if isinstance(value, str) and "." in value else value


def _object(name):
    module, _, kind = name.rpartition(".")
    return getattr(import_module(f"timm.models.{module}"), kind)


def _hugging_face(name, size, entries):
    configuration = getattr(transformers, f"{name}Config")(**entries, num_labels=CLASSES)
    kind = "ForImageClassification" if size else "ForSequenceClassification"
    return getattr(transformers, name + kind)(configuration)


@torch.no_grad()
def _move(network, matrices, vectors):
    for parameter in network.parameters():
        size = matrices * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else vectors
        parameter += size * torch.randn_like(parameter)
    for norm in batchnorms(network):
        deviation = norm.running_var.sqrt()
        norm.running_mean += vectors * deviation * torch.randn_like(deviation)
        norm.running_var *= (vectors * torch.randn_like(deviation)).exp()


def _images(size, count, scale):
    return torch.randn(count, 3, size, size).double() * scale + (1 - scale)


def _named(size, count, scale):
    if size:
        return {"pixel_values": _images(size, count, scale)}
    tokens = torch.randint(END + 1, int(TOKENS * scale), (count, LENGTH))
    lengths = torch.randint(3, LENGTH + 1, (count,))
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    tokens[torch.arange(count), lengths - 1] = END  # where a family asks for one
    return {"input_ids": tokens * mask + PADDING * (1 - mask), "attention_mask": mask}
