"""What is served of a run: its networks as servers, and the decoder of their replies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from coin.coding import Answers, Decoder, DecoderKind, decode_linear
from coin.coding.decoder_config import REPLICA
from coin.coding.promise import answer_score
from coin.data.transform import to_input
from coin.errors import ConfigurationError, ServingError
from coin.modules import Coded
from coin.networks import pad_head, run_network
from coin.networks.files import open_network
from coin.networks.registry import user_modules
from coin.reporting.summary import seed_folders
from coin.serving.policies import Policy, PolicyKind, StandIns


class Reply(NamedTuple):
    """A server's logits ``[B, C]``, and features ``[B, F]``, of width 0 where the decoder reads none."""

    logits: Tensor
    features: Tensor


class Decoded(NamedTuple):
    """A decoded answer's logits ``[B, C]``, and whether a promise covers it, bool ``[B]``."""

    logits: Tensor
    accepted: Tensor


class Request(NamedTuple):
    """Stored images, uint8 ``[B, 1 or 3, H, W]``, for a network's file; a body with adapters answers as an expert."""

    path: Path
    expert: int
    images: Tensor


def check_finite(reply: Reply) -> Reply:
    """Return a server's reply; raise `ServingError` if it has values that are not finite."""
    if not all(bool(values.isfinite().all()) for values in reply):
        raise ServingError("found a reply that is not finite")
    return reply


class NetworkServer:
    """An expert or a coded model that answers batches of stored images; logits are padded by zeros to `outputs`."""

    def __init__(
        self,
        path: Path,
        outputs: int,
        features: bool,
        device: str = "cpu",
    ) -> None:
        file = open_network(path)
        if file.config.reads != "images":
            raise ConfigurationError(
                f"found '{path}', which reads {file.config.reads}, expected a network for images"
            )
        # What has no adapters answers as it was evaluated, unpacked.
        is_body = len(file.adapters) > 0 and file.num_classes == outputs
        network = file.module() if is_body else pad_head(file.network, outputs)
        self.image_size = file.config.image_size
        self._network = network.requires_grad_(False).to(device)
        self._device = device
        self._features = features

    @property
    def probe(self) -> Tensor:
        """One black image."""
        return torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)

    @torch.no_grad()
    def __call__(self, images: Tensor, experts: int | Tensor = 0) -> Reply:
        """Return the reply to images, uint8 ``[B, 1 or 3, H, W]``, for an expert or for one an image ``[B]``."""
        inputs = to_input(images.to(self._device), self.image_size)
        run = run_network(self._network, inputs, self._features, experts)
        features = run.features if self._features else run.logits[:, :0]
        return Reply(run.logits.cpu(), features.cpu())


def run_together(
    network_of: Callable[[Path], NetworkServer], requests: Sequence[Request]
) -> list[Reply]:
    """Return the replies to requests, in one pass for each network and shape of its images, for mixed experts."""
    groups: dict[tuple[Path, torch.Size], list[int]] = {}
    for place, request in enumerate(requests):
        kind = request.path, request.images.shape[1:]
        groups.setdefault(kind, []).append(place)
    replies: dict[int, Reply] = {}
    for (path, _), places in groups.items():
        own = [requests[place] for place in places]
        sizes = [len(request.images) for request in own]
        images = torch.cat([request.images for request in own])  # [B, C, H, W]
        experts = torch.tensor([request.expert for request in own])
        experts_of_images = experts.repeat_interleave(torch.tensor(sizes))  # [B]
        together = network_of(path)(images, experts_of_images)
        logits = torch.split(together.logits, sizes)
        features = torch.split(together.features, sizes)
        for row, place in enumerate(places):
            replies[place] = Reply(logits[row], features[row])
    return [replies[place] for place in range(len(requests))]


@dataclass(frozen=True)
class System:
    """A run's coded system and the policy that it is served by."""

    files: Mapping[str, Path]  # the network's file of every server, a path that all machines see
    stand_ins: StandIns
    policy: Policy
    # By the lost experts; of all, where one reads no survivor.
    decoders: Mapping[tuple[int, ...], Decoder]
    classes: Sequence[int]  # how many every expert has
    features: bool  # whether replies have features
    holds_copies: bool = False  # whether replicas hold the experts' compressed copies
    modules: Sequence[str] = ()  # in which the networks' classes are

    @classmethod
    def of(
        cls,
        coded: Coded,
        policy: Policy,
        copies: Sequence[Path] = (),
    ) -> Self:
        """Return how a run's coded system is served by a policy that its decoder is for.

        Replicas hold the experts' files, or their `copies`.
        """
        decoder = next(iter(coded.decoders.values())).kind
        every_row = decoder is not DecoderKind.expert_head
        experts = [f"expert-{task}" for task in coded.names]
        stand_ins = StandIns(policy.which, experts, coded.code, every_row, coded.is_adapted)
        networks = [*experts, *stand_ins.coded]
        own = dict(zip(networks, coded.files, strict=True))
        held = dict(zip(experts, copies or coded.files, strict=False))  # by a replica
        files = {}
        for name in stand_ins.servers:
            process, _, expert = name.partition("/")
            path = held[expert] if process.startswith(REPLICA) else own[process]
            files[name] = path.absolute()
        return cls(
            files=files,
            stand_ins=stand_ins,
            policy=policy,
            decoders=dict(coded.decoders),
            classes=tuple(coded.classes or ()),
            features=decoder.reads_features,
            holds_copies=bool(copies),
            modules=user_modules(coded.files),
        )

    def expert_of(self, name: str) -> int:
        """Return for which expert a body with adapters answers as a server; 0 for a network that has no choice."""
        experts = self.stand_ins.experts
        own = name.rpartition("/")[2]
        return experts.index(own) if own in experts else 0

    def network(self, name: str) -> NetworkServer:
        """Return a new network of a server."""
        return self._read(self.files[name])

    def reader(self, names: Sequence[str], device: str = "cpu") -> Callable[[Path], NetworkServer]:
        """Return what reads the networks of a process's servers, each file once.

        Of compressed copies one is kept unpacked; another is read again when it is asked for.
        """
        # These the process that opened the run had imported, and no file may choose.
        for module in self.modules:
            import_module(module)
        read = partial(self._read, device=device)
        has_copies = self.holds_copies and any(name.startswith(REPLICA) for name in names)
        return lru_cache(maxsize=1 if has_copies else None)(read)

    def _read(self, path: Path, device: str = "cpu") -> NetworkServer:
        return NetworkServer(path, max(self.classes), self.features, device)

    def decode(self, expert: int, replies: Mapping[str, Reply]) -> Decoded:
        """Return an expert's answer by the decoder of what is missing, or from the available rows' equations."""
        names = self.stand_ins.experts
        coded = self.stand_ins.coded
        # A body with adapters has another name for each expert.
        suffix = f"/{names[expert]}"
        arrived = {}
        for name, reply in replies.items():
            arrived[name.removesuffix(suffix)] = reply.features, reply.logits
        outputs = [arrived.get(name) for name in (*names, *coded)]
        answers = Answers.of_servers(outputs, len(names))
        present = [place for place, name in enumerate(names) if place != expert and name in arrived]
        missing = tuple(place for place in range(len(names)) if place not in present)
        rows = [row for row, name in enumerate(coded) if name in arrived]
        is_whole = len(rows) == len(coded)
        decoder = self._decoder(missing, is_whole)
        accepted = torch.zeros(answers.num_samples, dtype=torch.bool)
        if decoder is None:
            matrix = self.stand_ins.code.matrix[rows]
            decoded = decode_linear(matrix, answers.coded[rows], answers.experts[present], missing)
            return Decoded(decoded[missing.index(expert)], accepted)
        logits = decoder.decode(answers)[decoder.erased.index(expert)]
        if expert in decoder.promises:
            scores = answer_score(logits[:, : self.classes[expert]])
            accepted = decoder.accepted(expert, scores)
        return Decoded(logits, accepted)

    def _decoder(self, missing: tuple[int, ...], is_whole: bool) -> Decoder | None:
        """Return the fitted decoder of missing experts, if there is one; `is_whole`: all coded models have answered."""
        for decoder in self.decoders.values():
            if not decoder.kind.reads_survivors:
                return decoder
        return self.decoders.get(missing) if is_whole else None


def read_coded(
    folder: Path, method: str | None, decoder: str | None, policy: PolicyKind | None
) -> Coded:
    """Return `Coded.from_run` with the recommended decoder that the policy can use; else a ConfigurationError."""
    reads_survivors = {"coded": False, "everyone": True}
    survivors = reads_survivors.get(Policy(policy).which) if policy else None
    return Coded.from_run(folder, method, decoder, survivors)


def read_copies(folder: Path, method: str, tasks: Sequence[str]) -> list[Path]:
    """Return the files of the experts' compressed copies of a run, by their method's name, ``replica-3bit-int8base``.

    Raises ConfigurationError where the run has none of that name.
    """
    copies = seed_folders(folder)[0] / "replicas"
    how = method.removeprefix(f"{REPLICA}-")
    paths = [copies / f"{task}.{how}.safetensors" for task in tasks]
    for path in paths:
        if not path.is_file():
            message = f"found no compressed copies '{method}' of the experts, expected '{path}'"
            raise ConfigurationError(
                f"{message}; add them to the experiment's replicas and run it again"
            )
    return paths
