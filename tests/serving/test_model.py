"""A network as a server, and as a process of one thread."""

import asyncio
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from coin.coding import DecoderConfig
from coin.errors import DataError
from coin.networks import NetworkConfig, Run, build_network, save_network
from coin.serving.model import NetworkServer
from coin.serving.ray_app import ModelProcess, run_together


def test_replies_are_padded_to_the_largest_class_count(tmp_path: Path, small_config: NetworkConfig) -> None:
    path = tmp_path / "expert.safetensors"
    save_network(path, build_network(small_config, 3), small_config, 3, {})
    images = torch.randint(256, (2, 1, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    plain = NetworkServer(path, 5, DecoderConfig("linear"))(images)
    assert plain.logits.shape == (2, 5)
    assert not plain.logits[:, 3:].any()
    assert plain.features is None
    server = NetworkServer(path, 5, DecoderConfig("feature_ridge"))
    reply = server(images)
    assert reply.features is not None
    assert server.feature_widths() == (reply.features.shape[1],)
    with pytest.raises(DataError, match="expected"):
        server(images.float())
    requests = [images.numpy(), images[:1].numpy(), np.zeros((1, 3, 16, 16), np.uint8)]
    together = run_together(server, requests[:2])
    for (logits, features), own in zip(together, (reply, reply.rows(0, 1)), strict=True):
        np.testing.assert_allclose(logits, own.logits, atol=1e-5)
        np.testing.assert_allclose(features, own.features, atol=1e-5)
    assert [len(logits) for logits, _ in run_together(server, requests)] == [2, 1, 1]  # of two shapes: two passes


def test_networks_for_texts_are_served(tmp_path: Path) -> None:
    options = {"vocabulary": 20, "depth": 1, "heads": 2, "width": 8, "mlp_width": 8}
    config = NetworkConfig("minilm", 6, None, options)
    save_network(tmp_path / "text.safetensors", build_network(config, 3), config, 3, {})
    server = NetworkServer(tmp_path / "text.safetensors", 3, DecoderConfig("feature_ridge"))
    assert server.reads == "texts"
    assert server(torch.ones(2, 6, dtype=torch.int64)).logits.shape == (2, 3)
    assert server.probe.shape == (1, 6)
    with pytest.raises(DataError, match="expected 6"):
        server(torch.ones(2, 5, dtype=torch.int64))


def one_by_one(**_: Any) -> Any:
    """Stand in for ``serve.batch``, which works within Ray's replicas alone."""

    def decorate(run: Any) -> Any:
        async def alone(request: Any) -> Any:
            return (await run([request]))[0]

        return alone

    return decorate


def test_passes_that_nobody_waits_for_are_not_begun(
    tmp_path: Path, small_config: NetworkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight batches that time out one after the other hold one thread, and only the first was run."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=SimpleNamespace(batch=one_by_one)))
    path = tmp_path / "expert.safetensors"
    save_network(path, build_network(small_config, 3), small_config, 3, {})
    process = ModelProcess({"it": path}, 3, DecoderConfig("linear"), "cpu", 1, 8)
    network, ran, threads = process._networks["it"], [], set()
    image = network.probe.numpy()
    answer = network._run

    def slow(stored: torch.Tensor) -> Run:
        ran.append(len(stored))
        threads.add(threading.get_ident())
        time.sleep(0.5)
        return answer(stored)

    network._run = slow  # type: ignore[method-assign]

    async def main() -> np.ndarray:
        for count in range(1, 9):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(process("it", image.repeat(count, 0)), 0.02)
        return (await process("it", image.repeat(9, 0)))[0]

    assert asyncio.run(main()).shape == (9, 3)
    assert ran == [1, 9]
    assert len(threads) == 1
