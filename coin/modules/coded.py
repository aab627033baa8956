"""A coded system: the code, the experts and the coded models."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from coin.coding import Answers, Code, Decoder, DecoderKind, Promise, answer_score, make_decoder
from coin.coding.decoder import Head
from coin.core.batches import Batch, size_of, take
from coin.core.devices import device_of
from coin.errors import ConfigurationError, DataError
from coin.files.tensors import fingerprint
from coin.modules.coded_file import SystemFile, save_coded
from coin.networks import Adapted, Compressed, linear_heads, run_network
from coin.networks.adapted import stored_nbytes
from coin.networks.calling import as_input
from coin.networks.guard import eval_mode
from coin.networks.running import check_as_plain

Networks = Sequence[nn.Module]
Erased = Sequence[int | str]
"""Lost experts, by index or by name."""


class Coded(LightningModule):
    """N experts, R coded models and their code.

    Networks run in eval mode and without gradients, on inputs moved to their device; their modes are restored. As a
    LightningModule it answers as the coded models do, in a Trainer's ``predict`` too, but for bodies with adapters, and
    ``to(device)`` moves it. By default `erased` are the experts of the last `fit_decoder`.

    Args:
        code: The code, R×N, or its rows.
        experts: The N experts.
        coded: The R coded models, one per row of the code; compressed ones stay packed while they run.
        names: The experts' tasks; ``0``, ``1``, … by default.

    Attributes:
        experts, coded: The networks.
        nbytes: The bytes of the coded models as stored.
        decoders: The fitted ones by the lost experts; the last is taken by default, and of several for one loss.
        classes: How many classes every expert has, once there were inputs.
        method, class_names, files: Of a run the merge method, the experts' classes, and all networks' files.

    >>> code = coin.convex(3, 2)
    >>> system = coin.Coded(code, experts, coin.merge_networks(coin.Average(), experts, code))
    >>> system = system.fit_decoder(inputs[0], [0, 2], "linear")
    >>> decoded = system.decode(inputs[0][0], [0, 2])
    >>> decoded.shape, system.score(decoded, [0, 2]).shape
    (torch.Size([2, 60, 3]), torch.Size([2, 60]))
    >>> [promise.coverage for promise in system.accept(0.05, inputs=[torch.randn(100, 4)], erased=[0, 2])]
    [1.0, 1.0]
    >>> system.save("system.safetensors")
    >>> again = coin.Coded.load("system.safetensors", experts)
    >>> torch.equal(again.decode(inputs[0][0], [0, 2]), decoded)
    True
    """

    def __init__(
        self,
        code: Code | Sequence[Sequence[float]],
        experts: Networks,
        coded: Sequence[nn.Module | Compressed],
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.code = code if isinstance(code, Code) else Code(code)
        expected = self.code.num_experts, self.code.num_coded
        if (len(experts), len(coded)) != expected:
            raise ConfigurationError(
                f"found {len(experts)} experts and {len(coded)} coded models, expected {expected[0]} and "
                f"{expected[1]}, as the code has"
            )
        self.names = tuple(map(str, range(len(experts)) if names is None else names))
        if len(set(self.names)) != len(experts):
            raise ConfigurationError(
                f"found names {self.names} of {len(experts)} experts, expected a name each"
            )
        self.experts = nn.ModuleList(experts)
        self.coded = nn.ModuleList()
        self.nbytes = 0
        for network in coded:
            if isinstance(network, Compressed):
                self.nbytes += network.nbytes
                body = Adapted(network.packed(), network.adapters)
                self.coded.append(body.to(device_of(experts[0])))
            else:
                self.nbytes += stored_nbytes(network)
                self.coded.append(network)
        self.decoders: dict[tuple[int, ...], Decoder] = {}
        self.classes: list[int] | None = None
        self.method = ""
        self.class_names: list[list[str]] | None = None
        self.files: tuple[Path, ...] = ()

    @property
    def is_adapted(self) -> bool:
        """Whether the coded models are bodies with adapters."""
        return any(isinstance(each, Adapted) and each.num_experts > 0 for each in self.coded)

    def forward(self, inputs: Batch) -> Tensor:
        """Return the coded models' logits ``[R, B, C]`` for inputs ``[B, ...]``; bodies with adapters raise."""
        return self.answers(inputs, erased=range(len(self.experts))).coded

    def answers(
        self,
        inputs: Batch,
        *,
        erased: Erased = (),
        features: bool = False,
        tasks: int | Tensor | None = None,
    ) -> Answers:
        """Run every network but the `erased` experts once on inputs ``[B, ...]``; their entries are NaN.

        Penultimate features come beside logits on demand. Bodies with adapters have to be told of which expert's task
        the inputs are: `tasks` ``[B]``, or one for all.
        """
        places = set(range(len(self.experts) + len(self.coded)))
        return self._run(places - set(self._indices(erased)), inputs, features, tasks)

    @torch.no_grad()
    def _run(
        self, places: Collection[int], inputs: Batch, features: bool, tasks: int | Tensor | None
    ) -> Answers:
        """Run the networks at these places, first the experts, then the coded models; other entries are NaN."""
        if self.is_adapted and tasks is None and max(places) >= len(self.experts):
            raise ConfigurationError(
                "found no tasks for a body with adapters, expected of which expert's task the inputs are; "
                "give tasks=, one for all or for each input [B]"
            )
        own = as_input(inputs, self.coded[0])
        with eval_mode(self):
            outputs = [
                run_network(network, own, features, tasks) if place in places else None
                for place, network in enumerate([*self.experts, *self.coded])
            ]
        return Answers.of_servers(outputs, len(self.experts))

    def heads(self, inputs: Any = None) -> list[Head]:
        """Return the experts' heads, for `make_decoder`: `linear_heads`, checked on the inputs, if any."""
        with eval_mode(self.experts):
            own = None if inputs is None else as_input(inputs, self.coded[0])
            return linear_heads(list(self.experts), own)

    @torch.no_grad()
    def count_classes(self, inputs: Any) -> list[int]:
        """Return every expert's number of logits, and keep it as `classes`."""
        if self.classes is None:
            few = take(as_input(inputs, self.experts[0]), slice(0, 2))
            with eval_mode(self.experts):
                runs = [run_network(expert, few, features=False) for expert in self.experts]
            self.classes = [run.logits.shape[1] for run in runs]
        return self.classes

    def fit_decoder(
        self, calibration: Iterable[Any], erased: Erased, kind: DecoderKind | str
    ) -> Self:
        """Fit a decoder for the loss of these experts; one that reads no survivor serves the loss of some of them too.

        Args:
            calibration: Batches of inputs ``[B, ...]``, or of pairs (inputs, labels); linear and expert_head need none.
            erased: The lost experts, by index or by name.
            kind: The decoder.

        Raises as `make_decoder` and `Decoder.fit`; ConfigurationError where the kind cannot read bodies with adapters.
        """
        if self.is_adapted and kind != DecoderKind.expert_head:
            raise ConfigurationError(
                f"the decoder {kind} cannot read a body with adapters, expected expert_head"
            )
        decoder = make_decoder(kind, self.code, self._indices(erased))
        batches = _batches(calibration)
        first = next(batches, None)
        if first is not None:
            self.count_classes(first)
            with eval_mode(self):
                _check_bodies(self.coded, first)
            batches = chain([first], batches)
        if decoder.kind is DecoderKind.expert_head:
            decoder.take_heads(self.heads(first))
        if decoder.kind.needs_fit:
            decoder.fit(self._answers_with_own(decoder, batches, None))
        self.decoders.pop(decoder.erased, None)  # so that it becomes the last one
        self.decoders[decoder.erased] = decoder
        return self

    def decode(self, inputs: Batch, erased: Erased | None = None) -> Tensor:
        """Return the logits ``[|erased|, B, C]`` of lost experts, C their most classes; those they lack are −∞.

        Only networks that the decoder reads run; without calibration every expert once, to count its classes.
        """
        decoder, lost = self._decoder_of(erased)
        places = decoder.servers(len(self.coded))
        classes = self.count_classes(inputs)
        decoded: list[Tensor] = []
        for expert in lost:
            # A body answers for each expert in a pass of its own.
            if not decoded or self.is_adapted:
                answers = self._run(places, inputs, decoder.kind.reads_features, expert)
                of_all = decoder.decode(answers)
            logits = of_all[decoder.erased.index(expert)]
            logits[:, classes[expert] :] = -torch.inf
            decoded.append(logits)
        width = max(classes[expert] for expert in lost)
        return torch.stack(decoded)[..., :width]

    def answer(self, inputs: Batch, expert: int | str) -> Tensor:
        """Return the logits ``[B, C]`` that stand in for those of one lost expert, as `decode` does."""
        return self.decode(inputs, [expert])[0]

    def score(self, decoded: Tensor, erased: Erased | None = None) -> Tensor:
        """Return the score ``[|erased|, B]`` of decoded logits: `coin.answer_score` over the expert's own classes."""
        _, lost = self._decoder_of(erased)
        classes = self.classes or [decoded.shape[2]] * len(self.experts)
        own = [logits[:, : classes[expert]] for expert, logits in zip(lost, decoded, strict=True)]
        return torch.stack([answer_score(logits) for logits in own])

    def accept(
        self,
        alpha: float,
        confidence: float = 0.95,
        *,
        inputs: Iterable[Any],
        erased: Erased | None = None,
        tasks: Tensor | Sequence[int] | None = None,
    ) -> list[Promise]:
        """Return a promise for each lost expert: of its accepted answers at most α differ from the expert's own.

        Args:
            alpha: α, the largest probability of a difference, in (0, 1).
            confidence: The probability that the promise holds, in (0, 1).
            inputs: Batches of new inputs, distributed like the queries and not used to fit anything.
            erased: The lost experts.
            tasks: Of which expert's task each input is, int64 over all batches, to promise from its own alone.
        """
        decoder, lost = self._decoder_of(erased)
        batches = list(_batches(inputs))
        answers = self._answers_with_own(decoder, batches, tasks)
        promises = decoder.accept(answers, alpha, confidence, self.count_classes(batches[0]))
        return [promises[expert] for expert in lost]

    def accepted(self, decoded: Tensor, erased: Erased | None = None) -> Tensor:
        """Return which decoded logits are accepted, bool ``[|erased|, B]``; DecodingError before `accept`."""
        decoder, lost = self._decoder_of(erased)
        scores = zip(lost, self.score(decoded, erased), strict=True)
        return torch.stack([decoder.accepted(expert, score) for expert, score in scores])

    def save(self, path: str | Path) -> None:
        """Write code, fitted decoders and the experts' fingerprints to a file, and each coded model to one beside it.

        These are called ``NAME.row-0.safetensors``, …; compressed ones are written as they run, packed.
        """
        place = Path(path)
        files = save_coded(place, self.coded)
        decoders = list(self.decoders.values())
        marks = [fingerprint(expert.state_dict()) for expert in self.experts]
        SystemFile(self.code, self.names, self.classes, decoders, marks, files).save(place)

    @classmethod
    def load(cls, path: str | Path, experts: Networks) -> Self:
        """Return the system that `save` wrote with these experts; its answers are identical to the last bit.

        Raises FileError where a file is missing, damaged or holds something else, StateError where the experts are
        others or tensors do not fit, ConfigurationError where their number is another's, or where the file is a run's,
        of several decoders for one erasure (`from_run`).
        """
        file = SystemFile.load(Path(path))
        system = cls(file.code, experts, file.coded_models(experts), file.names)
        system.decoders = {decoder.erased: decoder for decoder in file.decoders}
        if len(system.decoders) < len(file.decoders):
            raise ConfigurationError(
                f"found several decoders of an erasure in '{path}'; use from_run"
            )
        system.classes = file.classes
        return system

    @classmethod
    def from_run(
        cls,
        folder: str | Path,
        method: str | None = None,
        decoder: str | None = None,
        survivors: bool | None = None,
    ) -> "Coded":
        """Return a coded system that an experiment has evaluated: `coin.modules.from_run.system_of_run`."""
        from coin.modules.from_run import system_of_run  # which reads results

        return system_of_run(Path(folder), method, decoder, survivors)

    def _decoder_of(self, erased: Erased | None) -> tuple[Decoder, tuple[int, ...]]:
        """Return the decoder of lost experts, and these, by default those of the last `fit_decoder`."""
        latest = next(reversed(self.decoders), ())
        lost = latest if erased is None else self._indices(erased)
        able = [each for each in self.decoders.values() if lost and each.decodes(lost)]
        if not able:
            raise ConfigurationError(
                f"found no decoder of the loss of {list(lost)}, only of {list(self.decoders)}; call fit_decoder first"
            )
        return min(reversed(able), key=lambda decoder: len(decoder.erased)), lost

    def _indices(self, erased: Erased) -> tuple[int, ...]:
        """Return the indices of experts that are given by index or by name."""
        places: dict[Any, int] = {name: place for place, name in enumerate(self.names)}
        indices = [places.get(each, each) for each in erased]
        for index in indices:
            if index not in range(len(self.names)):
                expected = f"0 to {len(self.names) - 1}, or one of {', '.join(self.names)}"
                raise ConfigurationError(f"found lost expert {index!r:.60}, expected {expected}")
        return tuple(map(int, indices))

    def _answers_with_own(
        self, decoder: Decoder, batches: Iterable[Batch], tasks: Tensor | Sequence[int] | None
    ) -> Answers:
        """Return what a decoder reads and the lost experts' own answers, with the inputs' tasks if these are given."""
        task_of = None if tasks is None else torch.as_tensor(tasks)
        places = decoder.servers(len(self.coded)) | set(decoder.erased)
        parts: list[Answers] = []
        done = 0
        for batch in batches:
            size = size_of(as_input(batch, self.coded[0]))
            own = None if task_of is None else task_of[done : done + size]
            parts.append(self._run(places, batch, decoder.kind.reads_features, own))
            done += size
        if not parts:
            raise DataError(
                "found no batch of inputs, expected at least one; an ended iterator has none"
            )
        return replace(Answers.concatenate(parts), tasks=task_of)


def _check_bodies(networks: Iterable[nn.Module], inputs: Any) -> None:
    """Raise StateError as `check_as_plain`, of networks that are bodies with adapters."""
    for network in networks:
        if isinstance(network, Adapted):
            check_as_plain(network, as_input(inputs, network))


def _batches(inputs: Iterable[Any]) -> Iterator[Any]:
    """Return an iterator; a DataError for a single batch."""
    if isinstance(inputs, Tensor | Mapping):
        raise DataError(
            f"found a {type(inputs).__name__}, expected batches of inputs, such as a loader; give [inputs]"
        )
    return iter(inputs)
