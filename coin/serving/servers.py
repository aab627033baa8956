"""What is served of a run: its networks as servers, and the decoder of their replies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from coin.coding import Answers, Decoder, DecoderKind, decode_linear
from coin.coding.decoder_config import REPLICA
from coin.coding.promise import answer_score
from coin.data.transform import to_input
from coin.errors import ConfigurationError, DecodingError, FileError, ServingError
from coin.files.safetensors import load_provenance
from coin.files.tensors import fingerprint
from coin.modules import Coded
from coin.networks import answering, pad_head, run_network
from coin.networks.adapted import tensor_nbytes
from coin.networks.files import open_network
from coin.reporting.summary import seed_folders
from coin.serving.policies import Policy, PolicyKind, StandIns


class Reply(NamedTuple):
    """Logits ``[B, C]``, features ``[B, F]`` if they are read, and if a promise covers a decoded answer ``[B]``."""

    logits: Tensor
    features: Tensor | None = None
    accepted: Tensor | None = None


def check_reply(reply: Reply, samples: int, outputs: int) -> Reply:
    """Return a reply; raise `ServingError` unless it is finite, with a row of this many logits for each sample."""
    finite = all(bool(torch.isfinite(each).all()) for each in (reply.logits, reply.features) if each is not None)
    if not finite or reply.logits.shape != (samples, outputs):
        raise ServingError(f"found logits {list(reply.logits.shape)}, expected finite ones [{samples}, {outputs}]")
    return reply


class NetworkServer:
    """An expert or a coded model that answers batches of stored inputs; logits are padded by zeros to `outputs`.

    A body with adapters answers for `expert`, or for given experts, one or sample by sample [B]. It keeps up to
    `keep_mib` MiB of the experts' unpacked networks.
    """

    expert = 0

    def __init__(self, path: Path, outputs: int, features: bool, device: str = "cpu", keep_mib: float = 0.0) -> None:
        file = open_network(path)
        if file.config.reads != "images":
            raise ConfigurationError(f"found '{path}', which reads {file.config.reads}, expected a network for images")
        self.image_size = file.config.image_size
        network = file.module(keep_mib) if file.num_classes == outputs else pad_head(file.network, outputs)
        self._network = network.requires_grad_(False).to(device)
        self._device, self._features = device, features

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return tensor_nbytes(self._network)

    @property
    def probe(self) -> Tensor:
        """One black image."""
        return torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)

    @torch.no_grad()
    def __call__(self, stored: Tensor, experts: int | Tensor | None = None) -> Reply:
        """Return the reply to images, uint8 ``[B, 1 or 3, H, W]``; else a DataError."""
        inputs = to_input(stored.to(self._device), self.image_size)
        with answering([self._network], self.expert if experts is None else experts):
            run = run_network(self._network, inputs, self._features)
        return Reply(run.logits.cpu(), run.features.cpu() if self._features else None)


class CopyServer:
    """An expert's compressed copy, which `unpacked` reads when it is asked and may drop when others are."""

    def __init__(self, path: Path, unpacked: Callable[[Path], NetworkServer]) -> None:
        self.path, self.unpacked = path, unpacked

    @property
    def probe(self) -> Tensor:
        """One black image."""
        return self.unpacked(self.path).probe

    def __call__(self, stored: Tensor, experts: int | Tensor | None = None) -> Reply:
        """Return the copy's reply, as `NetworkServer` does."""
        return self.unpacked(self.path)(stored, experts)


def copy_servers(
    paths: Sequence[Path], unpack: Callable[[Path], NetworkServer], keep_mib: float
) -> dict[Path, CopyServer]:
    """Return servers of compressed copies that share `keep_mib` MiB of unpacked networks, or one network if it is more.

    The least recently used one goes.
    """
    if not paths:
        return {}
    most = 1
    if keep_mib > 0:
        most = max(1, int(keep_mib * 2**20 / unpack(paths[0]).nbytes))  # all have one architecture and as many outputs
    unpacked = lru_cache(maxsize=most)(unpack)
    return {path: CopyServer(path, unpacked) for path in paths}


@dataclass(frozen=True)
class System:
    """A run's coded system and the policy that it is served by."""

    files: Mapping[str, Path]  # the network's file of every server, a path that all machines see
    stand_ins: StandIns
    policy: Policy
    decoders: Mapping[tuple[int, ...], Decoder]  # by the lost experts; of all, where one reads no survivor
    classes: tuple[int, ...]  # how many every expert has
    features: bool  # whether replies have features
    copies: frozenset[Path] = frozenset()  # those of the files that are experts' compressed copies
    keep_mib: float = 0.0  # MiB of unpacked networks that a server which stands in may keep

    @classmethod
    def of(cls, coded: Coded, policy: Policy, copies: Sequence[Path] = (), keep_mib: float = 0.0) -> Self:
        """Return how a run's coded system is served by a policy that its decoder is for.

        Replicas hold the experts' files, or their `copies`.
        """
        config = next(iter(coded.decoders.values())).config
        names, classes = [f"expert-{task}" for task in coded.names], tuple(coded.classes or ())
        every_row = config.kind is not DecoderKind.expert_head
        stand_ins = StandIns(policy.which, names, coded.code, every_row, coded.is_adapted)
        own = dict(zip((*names, *stand_ins.coded), (path.absolute() for path in coded.files), strict=True))
        held = [path.absolute() for path in copies] or [own[name] for name in names]
        replicas = dict(zip(names, held, strict=True))
        files = {}
        for name in stand_ins.servers:
            process, _, expert = name.partition("/")
            files[name] = replicas[expert] if process.startswith(REPLICA) else own[process]
        copied = frozenset(held if copies else ())
        return cls(files, stand_ins, policy, dict(coded.decoders), classes, config.reads_features, copied, keep_mib)

    def network(self, name: str) -> NetworkServer:
        """Return the network of a server, a new one that answers for the server's expert."""
        network = self._read(self.files[name])
        network.expert = self.expert_of(name)
        return network

    def networks(self, names: Sequence[str], device: str = "cpu") -> dict[str, NetworkServer | CopyServer]:
        """Return the networks of some servers; those of one file are one."""
        paths = dict.fromkeys(self.files[name] for name in names)
        copied = [path for path in paths if path in self.copies]
        read = partial(self._read, device=device)
        made: dict[Path, NetworkServer | CopyServer] = {path: read(path) for path in paths if path not in self.copies}
        made |= copy_servers(copied, read, self.keep_mib)
        return {name: made[self.files[name]] for name in names}

    def _read(self, path: Path, device: str = "cpu") -> NetworkServer:
        keep_mib = 0.0 if path in self.copies else self.keep_mib  # copies share theirs
        return NetworkServer(path, max(self.classes), self.features, device, keep_mib)

    def expert_of(self, name: str) -> int:
        """Return for which expert a body with adapters answers as a server; 0 for a network that has no choice."""
        own = name.rpartition("/")[2]
        return self.stand_ins.experts.index(own) if own in self.stand_ins.experts else 0

    def decode(self, expert: int, replies: Mapping[str, Reply]) -> Reply:
        """Return an expert's answer by the decoder of what is missing, or from the available rows' equations."""
        names, coded = self.stand_ins.experts, self.stand_ins.coded
        replies = {name.removesuffix(f"/{names[expert]}"): reply for name, reply in replies.items()}
        sent = {name: own.logits[:, :0] if own.features is None else own.features for name, own in replies.items()}
        outputs = [(sent[name], replies[name].logits) if name in sent else None for name in (*names, *coded)]
        answers, accepted = Answers.of_servers(outputs, len(names)), None
        present = [place for place, name in enumerate(names) if place != expert and name in replies]
        missing = tuple(place for place in range(len(names)) if place not in present)
        rows = [row for row, name in enumerate(coded) if name in replies]
        decoder = next((own for own in self.decoders.values() if not own.config.reads_survivors), None)
        if decoder is None and len(rows) == len(coded):
            decoder = self.decoders.get(missing)
        if decoder is None:
            matrix = self.stand_ins.code.matrix[rows]
            decoded = decode_linear(matrix, answers.coded[rows], answers.experts[present], missing)
            logits = decoded[missing.index(expert)]
        else:
            logits = decoder.decode(answers)[decoder.erased.index(expert)]
            if expert in decoder.promises:
                accepted = decoder.accepted(expert, answer_score(logits[:, : self.classes[expert]]))
        if not bool(torch.isfinite(logits).all()):
            raise DecodingError(f"the decoded answer of {names[expert]} is not finite; its servers' are too large")
        return Reply(logits, None, accepted)


def read_coded(folder: Path, method: str | None, decoder: str | None, policy: PolicyKind | None) -> Coded:
    """Return `Coded.from_run` with the recommended decoder that the policy can use; else a ConfigurationError."""
    survivors = {"coded": False, "everyone": True}.get(Policy(policy).which) if policy else None
    return Coded.from_run(folder, method, decoder, survivors)


def read_copies(folder: Path, method: str, coded: Coded) -> list[Path]:
    """Return the files of the experts' compressed copies of a run, by their method's name, ``replica-3bit-int8base``.

    Raises ConfigurationError where the run has none of that name, FileError for those of other experts.
    """
    copies = seed_folders(folder)[0] / "replicas"
    how = method.removeprefix(f"{REPLICA}-")
    paths = [copies / f"{task}.{how}.safetensors" for task in coded.names]
    if not all(path.is_file() for path in paths):
        suffixes = sorted({path.name.removeprefix(f"{coded.names[0]}.") for path in copies.glob(f"{coded.names[0]}.*")})
        known = ", ".join(f"{REPLICA}-{suffix.removesuffix('.safetensors')}" for suffix in suffixes)
        told = f"found no compressed copies '{method}' in '{copies}', expected {known or 'some'}"
        raise ConfigurationError(f"{told}; name them, or add them to the experiment's replicas and run it again")
    for path, expert in zip(paths, coded.experts, strict=True):
        if load_provenance(path).get("of") != fingerprint(expert.state_dict()):
            raise FileError(f"'{path}' is not a compressed copy of the run's expert; run the experiment again")
    return paths
