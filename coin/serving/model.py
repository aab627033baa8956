"""A network as a server: images or texts in, replies out."""

import threading
from pathlib import Path

import torch
from torch import Tensor

from coin.coding import DecoderConfig
from coin.data.transform import to_input
from coin.networks import Run, load_network, pad_head, run_network
from coin.serving.replies import Reply


class NetworkServer:
    """An expert or a coded model that answers batches of stored inputs.

    Its safetensors file is read here, which raises FileError if it is missing or damaged. The logits of a network with
    fewer classes are padded by zeros to `outputs`; the decoder determines the features to send.
    """

    def __init__(self, path: Path, outputs: int, decoder: DecoderConfig, device: str = "cpu") -> None:
        file = load_network(path)
        self.image_size = file.config.image_size
        self.reads = file.config.reads
        self._network = pad_head(file.network, outputs).requires_grad_(False).to(device)
        self._device = device
        self._features = decoder.reads_features
        self._turn = threading.Lock()
        """Held during a pass: features are taken by hooks, which cannot tell two passes at a time apart."""

    @property
    def probe(self) -> Tensor:
        """One black image, or one text without words."""
        if self.reads == "texts":
            return torch.zeros(1, self.image_size, dtype=torch.int64)
        return torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)

    def __call__(self, stored: Tensor) -> Reply:
        """Return the reply to images, uint8 ``[B, 1 or 3, H, W]``, or texts, int64 ``[B, L]``; else a DataError."""
        run = self._run(stored)
        return Reply(run.logits.cpu(), run.features.cpu() if self._features else None)

    def feature_widths(self) -> tuple[int, ...] | None:
        """Return the widths of the features in a reply by stage, or None without features."""
        run = self._run(self.probe)
        return (run.features.shape[1],) if self._features else None

    @torch.no_grad()
    def _run(self, stored: Tensor) -> Run:
        inputs = to_input(stored.to(self._device), self.image_size)
        with self._turn:
            return run_network(self._network, inputs, self._features)
