"""Algorithms of FusionBench (github.com/tanganke/fusion_bench): `coin.Refit`, and a body with an adapter for each task.

Put this folder on the Python path and take `refit.yaml` or `body.yaml` as the method:

    export PYTHONPATH=notebooks/fusion_bench
    fusion_bench method=clip_refit …    # with the two files in FusionBench's config folder, under method/

Calibration images come from the model pool's training sets, ``samples_per_task`` of each, without their labels.
"""

from typing import Any

import torch
from fusion_bench import BaseAlgorithm, auto_register_config
from fusion_bench.dataset.clip_dataset import CLIPDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import CLIPVisionModel

import coin


class Same(nn.Linear):
    """A head that returns its input, so that no layer of a tower is taken for one."""

    def forward(self, features: Tensor) -> Tensor:
        """Return the features."""
        return features


class Tower(nn.Module):
    """A CLIP's vision tower of transformers as a classifier: its pooled output stands for the logits."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        width = tower.config.hidden_size
        self.head = Same(width, width, bias=False).requires_grad_(False)
        nn.init.eye_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled outputs [B, F] of images [B, 3, S, S]."""
        pooled: Tensor = self.head(self.tower(images).pooler_output)
        return pooled


class Calibrated(BaseAlgorithm):
    """Reads a model pool's networks and calibration images."""

    samples_per_task: int
    batch_size: int

    def read(self, modelpool: Any) -> tuple[list[str], list[nn.Module], list[list[Tensor]]]:
        """Return the networks' names, the networks in eval mode, and batches [B, 3, S, S] for each."""
        names = list(modelpool.model_names)
        networks = []
        calibration = []
        for name in names:
            network = modelpool.load_model(name)
            is_tower = isinstance(network, CLIPVisionModel)
            networks.append((Tower(network) if is_tower else network).eval())
            calibration.append(self._images(modelpool, name))
        return names, networks, calibration

    def _images(self, modelpool: Any, name: str) -> list[Tensor]:
        dataset = modelpool.load_train_dataset(name)
        has_processor = getattr(modelpool, "_processor", None) is not None
        if has_processor:
            dataset = CLIPDataset(dataset, modelpool.load_processor())
        count = min(self.samples_per_task, len(dataset))
        drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count]
        loader = DataLoader(Subset(dataset, drawn.tolist()), self.batch_size)
        return [images for images, _ in loader]


def plain(network: nn.Module) -> nn.Module:
    """Return the vision tower of a `Tower`, and any other network itself."""
    return network.tower if isinstance(network, Tower) else network


@auto_register_config
class Refit(Calibrated):
    """One network for all tasks, every layer refitted in closed form (`coin.Refit`).

    Args:
        samples_per_task: P.
        batch_size: Images at a time.
        ridge: λ, relative.
    """

    def __init__(
        self, samples_per_task: int = 200, batch_size: int = 32, ridge: float = 0.1, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)

    def run(self, modelpool: Any) -> nn.Module:
        """Return the merged network, of the class of the pool's."""
        names, networks, calibration = self.read(modelpool)
        is_tower = isinstance(networks[0], Tower)
        method = coin.Refit(ridge=self.ridge, head=not is_tower)
        code = coin.uniform(len(names))
        return plain(coin.merge_networks(method, networks, code, calibration=calibration)[0])


@auto_register_config
class Body(Calibrated):
    """One body and an adapter for each task (`coin.Refit` with adapters): a network for each task.

    Args:
        samples_per_task: P.
        batch_size: Images at a time.
        rank: r of the adapters.
        bits: Of a weight of the body.
    """

    def __init__(
        self,
        samples_per_task: int = 200,
        batch_size: int = 32,
        rank: int = 16,
        bits: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    def run(self, modelpool: Any) -> dict[str, Any]:
        """Return the network of each task by its name, and the MiB of the body with all adapters, as stored."""
        names, networks, calibration = self.read(modelpool)
        options = {"bits": self.bits}
        method = coin.Refit(adapters={"rank": self.rank}, compress=options)
        code = coin.uniform(len(names))
        merged = coin.merge_networks(method, networks, code, calibration=calibration)
        (packed,) = merged.compressed[f"{method.label}-{self.bits}bit"]
        adapted = coin.Adapted(packed.network(), packed.adapters)
        found = {name: plain(adapted.network(place)) for place, name in enumerate(names)}
        return {**found, "stored_mib": packed.nbytes / 2**20}
