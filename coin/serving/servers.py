"""What is served of a run: its networks as servers, and the decoder of their replies."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from coin.coding import Answers, Decoder, DecoderConfig, DecoderKind, decode_linear
from coin.coding.decoder_config import REPLICA
from coin.coding.score import answer_score
from coin.data.transform import to_input
from coin.errors import ConfigurationError, DecodingError, ServingError
from coin.modules import Coded
from coin.networks import load_network, pad_head, run_network
from coin.reporting.results import RESULTS_CSV, read_results
from coin.reporting.summary import REFERENCES, seed_folders
from coin.serving.policies import Policy, PolicyKind, StandIns, Which


class Reply(NamedTuple):
    """Logits ``[B, C]``, features ``[B, F]`` if they are read, and whether a promise covers a decoded answer ``[B]``."""

    logits: Tensor
    features: Tensor | None = None
    accepted: Tensor | None = None


def check_reply(reply: Reply, samples: int, outputs: int) -> Reply:
    """Return a reply; raise `ServingError` unless it is finite, with a row of this many logits for each sample."""
    if reply.logits.shape != (samples, outputs):
        raise ServingError(f"found logits {list(reply.logits.shape)}, expected [{samples}, {outputs}]")
    if not all(bool(torch.isfinite(each).all()) for each in (reply.logits, reply.features) if each is not None):
        raise ServingError("found a reply that is not finite")
    return reply


class NetworkServer:
    """An expert or a coded model that answers batches of stored inputs.

    Its file is read here, which raises FileError if it is missing or damaged. The logits of a network with fewer classes
    are padded by zeros to `outputs`.
    """

    def __init__(self, path: Path, outputs: int, features: bool, device: str = "cpu") -> None:
        file = load_network(path)
        self.image_size, self.reads = file.config.image_size, file.config.reads
        self._network = pad_head(file.network, outputs).requires_grad_(False).to(device)
        self._device, self._features = device, features
        self._turn = threading.Lock()  # features are taken by hooks, which cannot tell two passes at a time apart

    @property
    def probe(self) -> Tensor:
        """One black image, or one text without words."""
        if self.reads == "texts":
            return torch.zeros(1, self.image_size, dtype=torch.int64)
        return torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)

    @torch.no_grad()
    def __call__(self, stored: Tensor) -> Reply:
        """Return the reply to images, uint8 ``[B, 1 or 3, H, W]``, or texts, int64 ``[B, L]``; else a DataError."""
        inputs = to_input(stored.to(self._device), self.image_size)
        with self._turn:
            run = run_network(self._network, inputs, self._features)
        return Reply(run.logits.cpu(), run.features.cpu() if self._features else None)


@dataclass(frozen=True)
class System:
    """A run's coded system and the policy that it is served by.

    Args:
        files: The network's file of every server, by name: paths that all machines see.
        stand_ins: The servers that stand in for an expert; `policy`, when they are asked.
        decoders: Decoders by the experts that are lost; one that reads no survivor is for the loss of all.
        classes: How many classes every expert has.
        features: Whether replies have features.
    """

    files: Mapping[str, Path]
    stand_ins: StandIns
    policy: Policy
    decoders: Mapping[tuple[int, ...], Decoder]
    classes: tuple[int, ...]
    features: bool

    @classmethod
    def of(cls, coded: Coded, policy: Policy) -> Self:
        """Return how a run's coded system is served by a policy that its decoder is for."""
        assert coded.decoder is not None
        assert coded.classes is not None
        config, names = coded.decoder.config, [f"expert-{task}" for task in coded.names]
        stand_ins = StandIns(policy.which, names, coded.code, config.kind is not DecoderKind.expert_head)
        own = dict(zip((*names, *stand_ins.coded), (path.absolute() for path in coded.files), strict=True))
        files = {name: own[name.rpartition("/")[2]] for name in stand_ins.servers}
        return cls(files, stand_ins, policy, dict(coded.decoders), tuple(coded.classes), config.reads_features)

    def network(self, name: str, device: str = "cpu") -> NetworkServer:
        """Return the network of a server."""
        return NetworkServer(self.files[name], max(self.classes), self.features, device)

    def decode(self, expert: int, replies: Mapping[str, Reply]) -> Reply:
        """Return an expert's decoded answer: by the decoder of what is missing, or from the available rows' equations.

        Raises DecodingError where the answer is not finite.
        """
        names, coded, code = self.stand_ins.experts, self.stand_ins.coded, self.stand_ins.code
        missing = tuple(i for i, name in enumerate(names) if i == expert or name not in replies)
        rows, accepted = [row for row, name in enumerate(coded) if name in replies], None
        decoder = next((own for own in self.decoders.values() if not own.config.reads_survivors), None)
        if decoder is None and len(rows) == len(coded):
            decoder = self.decoders.get(missing)
        if decoder is not None:
            logits = decoder.decode(self._answers(replies))[decoder.erased.index(expert)]
            if expert in decoder.promises:
                accepted = decoder.accepted(expert, answer_score(logits[:, : self.classes[expert]]))
        else:
            arrived = torch.stack([replies[coded[row]].logits for row in rows])
            present = [replies[name].logits for i, name in enumerate(names) if i not in missing]
            survivors = torch.stack(present) if present else arrived[:0]
            logits = decode_linear(code.matrix[rows], arrived, survivors, missing)[missing.index(expert)]
        if not bool(torch.isfinite(logits).all()):
            raise DecodingError(f"the decoded answer of {names[expert]} is not finite; its servers' are too large")
        return Reply(logits, None, accepted)

    def _answers(self, replies: Mapping[str, Reply]) -> Answers:
        """Return the replies as a decoder reads them, NaN for those that did not arrive."""
        some = next(iter(replies.values()))
        nothing = Reply(*(None if each is None else torch.full_like(each, torch.nan) for each in some))
        groups = [
            [replies.get(name, nothing) for name in each] for each in (self.stand_ins.experts, self.stand_ins.coded)
        ]
        logits = [torch.stack([each.logits for each in group]) for group in groups]
        features = [[each.features for each in group if each.features is not None] or None for group in groups]
        return Answers(*logits, *features)


def read_coded(folder: Path, method: str | None, decoder: str | None, policy: PolicyKind | None) -> Coded:
    """Return `Coded.from_run`, where no decoder is named with the most accurate one that the policy can use.

    Raises ConfigurationError where there is none.
    """
    survivors = {Which.coded: False, Which.everyone: True}.get(Policy(policy).which) if policy else None
    if survivors is not None:
        frame = read_results(folder if (folder / RESULTS_CSV).is_file() else next(iter(seed_folders(folder)), folder))
        frame = frame[~frame["method"].isin(REFERENCES) & (frame["decoder"] != REPLICA)]
        reads = frame["decoder"].map(lambda name: DecoderConfig.named(name).reads_survivors).astype(bool)
        frame = frame[(reads == survivors) & (frame["decoder"] == (decoder or frame["decoder"]))]
        frame = frame[frame["method"] == (method or frame["method"])]
        if frame.empty:
            reads_it, one = ("the survivors", "ridge") if survivors else ("no survivor", "expert_head")
            found = f"found no results of {method or 'a method'} with {decoder or 'a decoder'} that reads {reads_it}"
            raise ConfigurationError(
                f"{found}, expected them for policy {policy}; add {one} to the decoders, run it again"
            )
        method, decoder = frame.groupby(["method", "decoder"])["decoded_accuracy"].mean().idxmax()
    return Coded.from_run(folder, method, decoder)
