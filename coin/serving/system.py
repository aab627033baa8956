"""What is served of a run: its networks as servers, and the decoder of their replies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from coin.coding import Answers, Decoder, decode_linear
from coin.coding.decoder_config import REPLICA
from coin.coding.promise import Promise, answer_score
from coin.modules import Coded
from coin.networks.files import open_network
from coin.networks.registry import user_modules
from coin.serving.policies import PolicyKind, StandIns
from coin.serving.servers import NetworkServer, Reply


class Answer(NamedTuple):
    """The answer for one expert: its server's, a replica's, or what was decoded from the others'."""

    logits: Tensor  # [B, C]
    answered_by: tuple[str, ...]
    accepted: Tensor | None = None  # of a decoded answer: whether a promise covers it, bool [B]

    @property
    def decoded(self) -> bool:
        """Whether it was decoded."""
        return self.accepted is not None


@dataclass(frozen=True)
class System:
    """A run's coded system, and how it is served."""

    classes: Mapping[str, Sequence[str]]  # the names of every task's classes, the experts' order
    files: Mapping[str, Sequence[Path]]  # by server, for each expert; all machines see them
    stand_ins: StandIns
    # By the lost experts; of all, where one reads no survivor.
    decoders: Mapping[tuple[int, ...], Decoder]
    features: bool  # whether replies have features
    quantile: float = 0.8  # of own answers' time, after which one is late
    image_size: int = 0
    variant: str = ""  # the merge method and the decoder, or the copies' name
    holds_copies: bool = False  # whether replicas hold the experts' compressed copies
    modules: Sequence[str] = ()  # in which the networks' classes are

    @classmethod
    def of(
        cls,
        coded: Coded,
        policy: PolicyKind,
        quantile: float,
        variant: str,
        copies: Sequence[Path] = (),
    ) -> Self:
        """Return how a run's coded system is served by a policy that its decoder is for.

        Replicas hold the experts' files, or their compressed `copies`, about whose answers nothing is promised.
        """
        decoder = next(iter(coded.decoders.values())).kind
        experts = [f"expert-{task}" for task in coded.names]
        stand_ins = StandIns(policy, experts, coded.code, coded.is_adapted)
        paths = [path.absolute() for path in coded.files]
        networks = [*experts, *stand_ins.coded]
        files = {name: [path] * len(experts) for name, path in zip(networks, paths, strict=True)}
        copied = [path.absolute() for path in copies]
        for row in range(coded.code.num_coded):
            files[f"{REPLICA}-{row}"] = copied or paths[: len(experts)]
        return cls(
            classes=dict(zip(coded.names, coded.class_names or (), strict=True)),
            files={name: files[name] for name in stand_ins.servers},
            stand_ins=stand_ins,
            decoders={} if copies else dict(coded.decoders),
            features=decoder.reads_features,
            quantile=quantile,
            image_size=open_network(paths[0]).config.image_size,
            variant=variant,
            holds_copies=len(copies) > 0,
            modules=user_modules(coded.files),
        )

    @property
    def promise(self) -> Promise | None:
        """What is promised of accepted answers, if anything."""
        for decoder in self.decoders.values():
            for promise in decoder.promises.values():
                return promise
        return None

    def network(self, path: Path, device: str = "cpu") -> NetworkServer:
        """Return a new network of a file."""
        outputs = max(len(names) for names in self.classes.values())
        return NetworkServer(path, outputs, self.features, device)

    def reader(self, device: str = "cpu") -> Callable[[Path], NetworkServer]:
        """Return what reads the networks of a server, each file once.

        Of compressed copies one is kept unpacked; another is read again when it is asked for.
        """
        # These the process that opened the run had imported, and no file may choose.
        for module in self.modules:
            import_module(module)
        most = 1 if self.holds_copies else None  # an expert's own server has one file
        return lru_cache(maxsize=most)(partial(self.network, device=device))

    def decode(self, expert: int, replies: Mapping[str, Reply]) -> Answer:
        """Return an expert's answer from the replies of servers that stand in for it.

        By the decoder of the missing experts; without one, or without all coded models, by the code's equations.
        """
        experts = self.stand_ins.experts
        coded = self.stand_ins.coded
        arrived = {name: (reply.features, reply.logits) for name, reply in replies.items()}
        outputs = [arrived.get(name) for name in (*experts, *coded)]
        answers = Answers.of_servers(outputs, len(experts))
        missing = tuple(place for place, name in enumerate(experts) if name not in arrived)
        rows = [row for row, name in enumerate(coded) if name in arrived]
        accepted = torch.zeros(answers.num_samples, dtype=torch.bool)
        decoder = self.decoders.get(missing)
        is_whole = len(rows) == len(coded)
        if decoder is None or (decoder.kind.reads_survivors and not is_whole):
            present = [place for place in range(len(experts)) if place not in missing]
            matrix = self.stand_ins.code.matrix[rows]
            lost = decode_linear(matrix, answers.coded[rows], answers.experts[present], missing)
            return Answer(lost[missing.index(expert)], tuple(replies), accepted)
        logits = decoder.decode(answers)[missing.index(expert)]
        if expert in decoder.promises:
            names = list(self.classes.values())[expert]
            accepted = decoder.accepted(expert, answer_score(logits[:, : len(names)]))
        return Answer(logits, tuple(replies), accepted)
