"""A coded system: the code, the experts and the coded models."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from coin.coding import (
    Answers,
    Code,
    Decoder,
    DecoderKind,
    Promise,
    answer_score,
    make_decoder,
)
from coin.coding.decoder import Head
from coin.core.batches import Batch, size_of, take
from coin.core.devices import device_of
from coin.errors import ConfigurationError, DataError, StateError
from coin.evaluation.scores import server_answers
from coin.files.tensors import check_layout, fingerprint
from coin.merging.method import fill
from coin.modules.coded_file import Body, SystemFile, all_tensors
from coin.networks import Adapted, Compressed, linear_heads, load_network, run_network
from coin.networks.adapted import resident_nbytes, stored_nbytes
from coin.networks.calling import as_input, clone
from coin.networks.files import open_network
from coin.networks.guard import eval_mode
from coin.networks.heads import of_one_width
from coin.networks.running import check_as_plain

if TYPE_CHECKING:
    import pandas as pd

Networks = Sequence[nn.Module]
Erased = Sequence[int | str]
"""Lost experts, by index or by name."""
TaskOfEach = Tensor | Sequence[int] | None
"""Of which expert's task each input is, int64 over all batches."""


class Coded(LightningModule):
    """N experts, R coded models and their code.

    Networks run in eval mode and without gradients, on inputs moved to their device; their modes are restored. As a
    LightningModule it answers as the coded models do, in a Trainer's ``predict`` too, and ``to(device)`` moves it.
    By default `erased` are the experts of the last `fit_decoder`.

    Args:
        code: The code, R×N, or its rows.
        experts: The N experts.
        coded: The R coded models, one per row of the code; compressed ones stay packed while they run.
        names: The experts' tasks; ``0``, ``1``, … by default.

    Attributes:
        experts, coded: The networks.
        nbytes: The bytes of the coded models as stored.
        decoders: The fitted ones by the lost experts; the last is taken by default.
        classes: How many classes every expert has, once there were inputs.
        method, batchnorm, results: Of a run (`from_run`), the merge method, the requested BatchNorm policy, and the
            rows of ``results.csv`` with this method and decoder.
        class_names, files: Of a run, every expert's class names, and the networks' files, the experts' first.

    Raises ConfigurationError where the numbers of experts or coded models do not fit the code.

    >>> code = coin.convex(3, 2)
    >>> system = coin.Coded(code, experts, coin.merge_networks(coin.Average(), experts, code))
    >>> for erased in code.erasures():  # each expert alone, and every two
    ...     _ = system.fit_decoder(inputs[0], erased, "linear")
    >>> decoded = system.decode(inputs[0][0], [0, 2])
    >>> decoded.shape, system.score(decoded, [0, 2]).shape
    (torch.Size([2, 60, 3]), torch.Size([2, 60]))
    >>> [promise.coverage for promise in system.accept(0.05, inputs=[torch.randn(100, 4)], erased=[0, 2])]
    [1.0, 1.0]
    >>> system.accepted(decoded, [0, 2]).shape
    torch.Size([2, 60])
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
        own = (len(experts), len(coded))
        if own != (self.code.num_experts, self.code.num_coded):
            expected = f"{self.code.num_experts} and {self.code.num_coded}, as the code has"
            raise ConfigurationError(
                f"found {len(experts)} experts and {len(coded)} coded models, expected {expected}"
            )
        given = range(len(experts)) if names is None else names
        self.names = tuple(map(str, given))
        if len(set(self.names)) != len(experts):
            raise ConfigurationError(
                f"found names {self.names} of {len(experts)} experts, expected a name each"
            )
        self.nbytes = 0
        networks: list[nn.Module] = []
        for each in coded:
            if isinstance(each, Compressed):
                self.nbytes += each.nbytes
                body = Adapted(each.packed(), each.adapters)
                networks.append(body.to(device_of(experts[0])))
            else:
                self.nbytes += stored_nbytes(each)
                networks.append(each)
        self.experts = nn.ModuleList(experts)
        self.coded = nn.ModuleList(networks)
        self.decoders: dict[tuple[int, ...], Decoder] = {}
        self.classes: list[int] | None = None
        self.method = ""
        self.batchnorm = ""
        self.results: pd.DataFrame | None = None
        self.class_names: list[list[str]] | None = None
        self.files: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        names = ", ".join(self.names)
        return f"Coded(experts: {names}; coded models: {len(self.coded)}; decoders: {list(self.decoders)})"

    @property
    def is_adapted(self) -> bool:
        """Whether the coded models are bodies with adapters."""
        bodies = [network for network in self.coded if isinstance(network, Adapted)]
        return any(body.num_experts > 0 for body in bodies)

    @property
    def resident_nbytes(self) -> int:
        """The bytes of weights that are in memory while the coded models answer."""
        return sum(resident_nbytes(network) for network in self.coded)

    @torch.no_grad()
    def forward(self, inputs: Batch) -> Tensor:
        """Return the coded models' logits ``[R, B, C]`` for inputs ``[B, ...]``."""
        return self.answers(inputs, erased=range(len(self.experts))).coded

    @torch.no_grad()
    def answers(
        self,
        inputs: Batch,
        *,
        features: bool = False,
        erased: Erased = (),
        silent: Sequence[int] = (),
        tasks: int | Tensor | None = None,
    ) -> Answers:
        """Run every server once on inputs ``[B, ...]``; return penultimate features beside logits on demand.

        Neither `erased` experts, by index or by name, nor `silent` coded models run: their entries are NaN. Bodies with
        adapters have to be told of which expert's task the inputs are: `tasks` [B], or one for all.
        """
        count = len(self.experts)
        servers: list[nn.Module | None] = [*self.experts, *self.coded]
        for expert in self._indices(erased):
            servers[expert] = None
        for row in silent:
            servers[count + row] = None
        if all(server is None for server in servers):
            raise ConfigurationError(
                "found every server erased or silent, expected one that runs; leave one out"
            )
        runs_body = any(server is not None for server in servers[count:])
        if self.is_adapted and runs_body and tasks is None:
            raise ConfigurationError(
                "found no tasks for a body with adapters, expected of which expert's task the inputs are; "
                "give tasks=, one for all or [B]"
            )
        with eval_mode(self):
            own = as_input(inputs, self.coded[0])
            return server_answers(servers, count, own, features, tasks)

    def heads(self, inputs: Any = None) -> list[Head]:
        """Return the experts' heads, for `make_decoder`: `linear_heads`, checked on the inputs, if any."""
        own = None if inputs is None else as_input(inputs, self.coded[0])
        with eval_mode(self.experts):
            return linear_heads(list(self.experts), own)

    @torch.no_grad()
    def count_classes(self, inputs: Any) -> list[int]:
        """Return every expert's number of logits, and keep it as `classes`."""
        if self.classes is None:
            classes = []
            with eval_mode(self.experts):
                for expert in self.experts:
                    few = take(as_input(inputs, expert), slice(0, 2))
                    logits = run_network(expert, few, features=False).logits
                    classes.append(logits.shape[1])
            self.classes = classes
        return self.classes

    def fit_decoder(
        self,
        calibration: Iterable[Any],
        erased: Erased,
        kind: DecoderKind | str,
    ) -> Self:
        """Fit a decoder for lost experts: once for every erasure, or with all experts if it needs no survivor.

        Args:
            calibration: Batches of inputs ``[B, ...]``, or of pairs whose labels are ignored. The linear decoder and
                expert_head need none, but expert_head's first batch checks heads and features.
            erased: The lost experts, by index or by name.
            kind: The decoder.
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
                for body in self.coded:
                    if isinstance(body, Adapted):
                        check_as_plain(body, as_input(first, body))
            batches = chain([first], batches)
        if decoder.kind is DecoderKind.expert_head:
            decoder.take_heads(self.heads(first))
        if decoder.kind.needs_fit:
            decoder.fit(self._answers_with_own(decoder, batches, None))
        self.decoders.pop(decoder.erased, None)  # so that it becomes the last one
        self.decoders[decoder.erased] = decoder
        return self

    def decode(self, inputs: Batch, erased: Erased | None = None) -> Tensor:
        """Return the logits ``[|erased|, B, C]`` of lost experts; only servers that the decoder needs run.

        C is the largest of their class counts, for which all experts run once where there was no calibration. The
        logits of classes that an expert does not have are −∞.
        """
        decoder, lost = self._decoder_of(erased)
        places = [decoder.erased.index(expert) for expert in lost]
        if self.is_adapted:  # the answer for each lost expert takes a pass of its own
            each = []
            for expert, place in zip(lost, places, strict=True):
                answers = self._answers_for(decoder, inputs, tasks=expert)
                each.append(decoder.decode(answers)[place])
            decoded = torch.stack(each)
        else:
            answers = self._answers_for(decoder, inputs)
            decoded = decoder.decode(answers)[places]
        classes = self.count_classes(inputs)
        widths = [classes[expert] for expert in lost]
        for logits, width in zip(decoded, widths, strict=True):
            logits[:, width:] = -torch.inf
        return decoded[..., : max(widths)]

    def score(self, decoded: Tensor, erased: Erased | None = None) -> Tensor:
        """Return the score ``[|erased|, B]`` of decoded logits: `coin.answer_score` over the expert's own classes."""
        _, lost = self._decoder_of(erased)
        classes = self.classes or [decoded.shape[2]] * len(self.experts)
        scores = []
        for expert, logits in zip(lost, decoded, strict=True):
            own = logits[:, : classes[expert]]
            scores.append(answer_score(own))
        return torch.stack(scores)

    def accept(
        self,
        alpha: float,
        confidence: float = 0.95,
        *,
        inputs: Iterable[Any],
        erased: Erased | None = None,
        tasks: TaskOfEach = None,
    ) -> list[Promise]:
        """Return a promise for each lost expert: of its accepted answers at most α differ from the expert's own.

        If none can be given, none of its decoded answers are accepted.

        Args:
            alpha: α, the largest probability of a difference, in (0, 1).
            confidence: The probability that the promise holds, in (0, 1).
            inputs: Batches of new inputs, distributed like the queries and not used to fit anything.
            erased: The lost experts.
            tasks: Of which expert's task each input is, int64 over all batches, for promises from its own alone.
        """
        decoder, lost = self._decoder_of(erased)
        batches = list(_batches(inputs))
        answers = self._answers_with_own(decoder, batches, tasks)
        promises = decoder.accept(answers, alpha, confidence, self.count_classes(batches[0]))
        return [promises[expert] for expert in lost]

    def accepted(self, decoded: Tensor, erased: Erased | None = None) -> Tensor:
        """Return which decoded logits are accepted, bool ``[|erased|, B]``; DecodingError before `accept`."""
        decoder, lost = self._decoder_of(erased)
        accepted = []
        for expert, score in zip(lost, self.score(decoded, erased), strict=True):
            accepted.append(decoder.accepted(expert, score))
        return torch.stack(accepted)

    def save(self, path: str | Path) -> None:
        """Write code, coded models, fitted decoders and the experts' fingerprints to one safetensors file.

        Compressed coded models are written as they run, packed.
        """
        file = SystemFile(
            code=self.code,
            names=self.names,
            classes=self.classes,
            decoders=list(self.decoders.values()),
            experts=[fingerprint(expert.state_dict()) for expert in self.experts],
            coded=[all_tensors(network) for network in self.coded],
            bodies=[Body.of(network) for network in self.coded],
        )
        file.save(Path(path))

    @classmethod
    def load(cls, path: str | Path, experts: Networks) -> Self:
        """Return the system that `save` wrote with these experts; its answers are identical to the last bit.

        Raises FileError where the file is missing, damaged or holds something else, StateError where the experts are
        others or tensors do not fit.
        """
        return cls._of_file(SystemFile.load(Path(path)), str(path), experts)

    @classmethod
    def from_run(
        cls,
        folder: str | Path,
        method: str | None = None,
        decoder: str | None = None,
        survivors: bool | None = None,
    ) -> Self:
        """Return a coded system that an experiment has evaluated, with its decoders and promises.

        Args:
            folder: An experiment's folder, whose first seed is taken, or a seed's.
            method: The method's name in the results, or that of its variant, as tables and files have it.
            decoder: The decoder's name in the results. Of all pairs that fit, the `recommended` one is taken.
            survivors: Whether the decoder reads survivors; None takes either.

        Raises what `load` does, and ConfigurationError where there are no such results.
        """
        from coin.modules.from_run import chosen_system  # a system in memory needs no results

        chosen = chosen_system(Path(folder), method, decoder, survivors)
        file = SystemFile.load(chosen.path)
        file.decoders = [each for each in file.decoders if each.kind == chosen.decoder]
        folder_of_experts = chosen.path.parent.parent / "experts"
        experts = []
        for task, place in zip(file.names, file.expert_files, strict=True):
            of_run = folder_of_experts / task / "expert.safetensors"
            experts.append(load_network(of_run if of_run.is_file() else place))
        networks = [expert.network for expert in experts]
        system = cls._of_file(file, str(chosen.path), networks)
        system.method = file.told["method"]
        system.batchnorm = file.told["batchnorm"]
        system.results = chosen.rows
        system.files = (*(expert.path for expert in experts), *file.coded_files)
        system.class_names = []
        for expert in experts:
            numbers = range(expert.num_classes)
            names = expert.provenance.get("classes") or numbers
            system.class_names.append([str(name) for name in names])
        return system

    @classmethod
    def _of_file(
        cls,
        file: SystemFile,
        path: str,
        experts: Networks,
    ) -> Self:
        """Return the system that a file holds, with these experts and the coded models of the file or beside it."""
        count = len(file.experts)
        if len(experts) != count:
            raise ConfigurationError(
                f"found {len(experts)} experts, expected the {count} of '{path}'"
            )
        for place, expert in enumerate(experts):
            if fingerprint(expert.state_dict()) != file.experts[place]:
                raise StateError(
                    f"expert {place} is not the one that '{path}' was saved with; give those experts"
                )
        networks: list[nn.Module | Compressed] = [
            open_network(each).kept for each in file.coded_files
        ]
        for row, state in enumerate(file.coded):
            like = of_one_width(experts)[0]
            body = file.bodies[row]
            network = clone(like).eval() if body is None else body.network(like, state)
            check_layout(all_tensors(network), state, f"coded model {row} of {path}")
            fill(network, state)
            networks.append(network)
        system = cls(file.code, experts, networks, file.names)
        system.decoders = {decoder.erased: decoder for decoder in file.decoders}
        system.classes = file.classes
        return system

    def _indices(self, erased: Erased) -> tuple[int, ...]:
        """Return experts that are given by index or by name."""
        if not isinstance(erased, Sequence) or isinstance(erased, str):
            raise ConfigurationError(
                f"found erased={erased!r}, expected a list of lost experts; give [{erased!r}]"
            )
        places: dict[Any, int] = {name: place for place, name in enumerate(self.names)}
        last = len(self.names) - 1
        indices = []
        for each in erased:
            index = places.get(each, each)
            if index not in range(last + 1):
                expected = f"0 to {last}, or one of {', '.join(self.names)}"
                raise ConfigurationError(f"found lost expert {each!r:.60}, expected {expected}")
            indices.append(int(index))
        return tuple(indices)

    def _decoder_of(self, erased: Erased | None) -> tuple[Decoder, tuple[int, ...]]:
        """Return the decoder of lost experts, and these, by default those of the last `fit_decoder`."""
        lost = next(reversed(self.decoders), ()) if erased is None else self._indices(erased)
        if lost in self.decoders:
            return self.decoders[lost], lost
        for key, decoder in self.decoders.items():
            is_one_of_many = not decoder.kind.reads_survivors and set(lost) <= set(key)
            is_same = sorted(key) == sorted(lost)
            if lost and (is_one_of_many or is_same):
                return decoder, lost
        found = (
            "found no decoder"
            if erased is None
            else f"found no decoder of the loss of {list(erased)}"
        )
        if self.decoders:
            known = [str(list(key)) for key in self.decoders]
            found += f", only of {', '.join(known)}"
        raise ConfigurationError(f"{found}; call fit_decoder with the lost experts first")

    def _answers_for(
        self,
        decoder: Decoder,
        inputs: Batch,
        own: Sequence[int] = (),
        tasks: int | Tensor | None = None,
    ) -> Answers:
        """Return the answers that a decoder needs, and these experts' own."""
        needed = {*decoder.survivors, *own}
        rows = decoder.rows(len(self.coded))
        erased = [expert for expert in range(len(self.experts)) if expert not in needed]
        silent = [row for row in range(len(self.coded)) if row not in rows]
        return self.answers(
            inputs,
            features=decoder.kind.reads_features,
            erased=erased,
            silent=silent,
            tasks=tasks,
        )

    def _answers_with_own(
        self, decoder: Decoder, batches: Iterable[Batch], tasks: TaskOfEach
    ) -> Answers:
        """Return what a decoder needs and the lost experts' own answers, with the inputs' tasks if these are given."""
        task_of = None if tasks is None else torch.as_tensor(tasks)
        if self.is_adapted and task_of is None:
            expected = "expected of which expert's task each input is, for bodies with adapters"
            raise ConfigurationError(
                f"found no tasks, {expected}; give tasks=[0, 0, …, 1, …], a number for each input"
            )
        parts: list[Answers] = []
        done = 0
        for batch in batches:
            size = size_of(as_input(batch, self.coded[0]))
            own = None if task_of is None else task_of[done : done + size]
            parts.append(self._answers_for(decoder, batch, decoder.erased, own))
            done += size
        if not parts:
            raise DataError(
                "found no batch of inputs, expected at least one; an iterator that has ended gives none"
            )
        return replace(Answers.concatenate(parts), tasks=task_of)


def _batches(inputs: Iterable[Any]) -> Iterator[Any]:
    """Return an iterator; a DataError for a single batch."""
    if isinstance(inputs, Tensor | Mapping):
        raise DataError(
            f"found a {type(inputs).__name__}, expected batches of inputs, such as a loader; give [inputs]"
        )
    return iter(inputs)
