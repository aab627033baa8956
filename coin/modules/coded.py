"""A coded system: the code, the experts and the coded models."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from coin.coding import Answers, Code, Decoder, DecoderConfig, DecoderKind, Promise, answer_score, make_decoder
from coin.coding.decoders import ExpertHeadDecoder, Head
from coin.core.batches import Batch, size_of, take
from coin.errors import ConfigurationError, DataError, StateError
from coin.evaluation.scores import server_answers
from coin.files.safetensors import load_provenance
from coin.files.tensors import check_layout, fingerprint
from coin.merging.method import fill
from coin.modules.coded_file import Body, SystemFile, all_tensors
from coin.networks import Adapted, Compressed, answering, linear_heads, load_network, run_network
from coin.networks.adapted import resident_nbytes, stored_nbytes
from coin.networks.calling import Forward, as_input, called_by, clone
from coin.networks.files import open_network
from coin.networks.guard import eval_mode
from coin.networks.heads import of_one_width
from coin.reporting.choice import recommended
from coin.reporting.results import read_results, requested_policy
from coin.reporting.summary import read_run, stand_ins, summarise, variant_names

Networks = Sequence[nn.Module]


class CodedModule(LightningModule):
    """The networks of a coded system as a module, which answers as the coded models do."""

    def __init__(self, experts: Networks, coded: Networks) -> None:
        super().__init__()
        self.experts, self.coded = nn.ModuleList(experts), nn.ModuleList(coded)

    @torch.no_grad()
    def forward(self, inputs: Batch) -> Tensor:
        """Return the coded models' logits ``[R, B, C]`` for inputs ``[B, ...]``."""
        idle, own = range(len(self.experts)), as_input(inputs, self.coded[0])
        with eval_mode(self):
            return server_answers(self.experts, self.coded, own, features=False, idle=idle).coded


class Coded:
    """N experts, R coded models and their code.

    Networks run in eval mode and without gradients, on inputs moved to their device; their modes are restored.
    Where `erased` is None it is that of the last `fit_decoder`.

    Args:
        code: The code, R×N, or its rows.
        experts: The N experts.
        coded: The R coded models, one per row of the code; compressed ones stay packed while they run.
        names: The experts' tasks; ``0``, ``1``, … by default.
        forward: (network, inputs) → logits ``[B, C]``, for networks that are not called with one tensor; inputs may
            then be mappings of tensors.
        keep_mib: The MiB of plain networks that each body with adapters may keep, to be as fast as the experts; see
            `coin.Adapted`.

    Attributes:
        module: The networks as a LightningModule, for ``module.to(device)``, DDP or a Trainer's ``predict``.
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
        self, code: Code | Sequence[Sequence[float]], experts: Networks, coded: Sequence[nn.Module | Compressed],
        names: Sequence[str] | None = None, forward: Forward | None = None, keep_mib: float = 0.0,
    ) -> None:  # fmt: skip
        self.code = code if isinstance(code, Code) else Code(code)
        if (len(experts), len(coded)) != (self.code.num_experts, self.code.num_coded):
            expected = f"{self.code.num_experts} and {self.code.num_coded}, as the code has"
            raise ConfigurationError(f"found {len(experts)} experts and {len(coded)} coded models, expected {expected}")
        self.names = tuple(map(str, range(len(experts)) if names is None else names))
        if len({*self.names}) != len(experts):
            raise ConfigurationError(f"found names {self.names} of {len(experts)} experts, expected a name each")
        compressed = [each for each in coded if isinstance(each, Compressed)]
        whole = [each for each in coded if isinstance(each, nn.Module)]
        self.nbytes = sum(each.nbytes for each in compressed)
        self.nbytes += sum(map(stored_nbytes, whole))
        self.nbytes += max((each.base_nbytes for each in compressed), default=0)
        networks = [
            Adapted(each.packed(), each.adapters) if isinstance(each, Compressed) else each  # packed, as it is kept
            for each in coded
        ]
        if keep_mib > 0:
            for network in networks:
                if isinstance(network, Adapted):
                    network.keep(keep_mib)
        self.module = CodedModule([_called_by(n, forward) for n in experts], [_called_by(n, forward) for n in networks])
        self.decoders: dict[tuple[int, ...], Decoder] = {}
        self.classes: list[int] | None = None
        self.method = self.batchnorm = ""
        self.results: pd.DataFrame | None = None
        self.class_names: list[list[str]] | None = None
        self.files: tuple[Path, ...] = ()
        self._checked_heads = False  # whether logits are known to be the heads' of the features

    def __repr__(self) -> str:
        return f"Coded(experts: {', '.join(self.names)}; coded models: {len(self.coded)}; decoders: {[*self.decoders]})"

    @property
    def experts(self) -> nn.ModuleList:
        """The experts, those of `module`."""
        return self.module.experts

    @property
    def coded(self) -> nn.ModuleList:
        """The coded models, those of `module`."""
        return self.module.coded

    @torch.no_grad()
    def answers(
        self, inputs: Batch, *, features: bool = False, erased: Sequence[int | str] = (), silent: Sequence[int] = (),
        tasks: int | Tensor | None = None,
    ) -> Answers:  # fmt: skip
        """Run every server once on inputs ``[B, ...]``; return penultimate features beside logits on demand.

        Neither `erased` experts, by index or by name, nor `silent` coded models run: their entries are NaN. Bodies with
        adapters have to be told of which expert's task the inputs are: `tasks` [B], or one for all.
        """
        idle = {*self._indices(erased), *(len(self.experts) + row for row in silent)}
        with eval_mode(self.module):
            return server_answers(self.experts, self.coded, as_input(inputs, self.coded[0]), features, idle, tasks)

    @property
    def is_adapted(self) -> bool:
        """Whether the coded models are bodies with adapters."""
        return any(isinstance(network, Adapted) and network.num_experts > 0 for network in self.coded)

    @property
    def resident_nbytes(self) -> int:
        """The bytes of weights that are in memory while the coded models answer."""
        return sum(map(resident_nbytes, self.coded))

    def heads(self, inputs: Any = None) -> list[Head]:
        """Return the experts' heads, for `make_decoder`: `linear_heads`, checked on the first few inputs, if any."""
        self._checked_heads |= inputs is not None
        with eval_mode(self.experts):
            return linear_heads(list(self.experts), None if inputs is None else as_input(inputs, self.coded[0]))

    def fit_decoder(
        self,
        calibration: Iterable[Any],
        erased: Sequence[int | str],
        kind: DecoderKind | str | DecoderConfig,
    ) -> Self:
        """Fit a decoder for lost experts: once for every erasure, or with all experts if it needs no survivor.

        Args:
            calibration: Batches of inputs ``[B, ...]``, or of pairs whose labels are ignored. The linear decoder and
                expert_head need none, but expert_head's first batch checks heads and features.
            erased: The lost experts, by index or by name.
            kind: The decoder: a kind with its default options, or a configuration.
        """
        if self.is_adapted and DecoderConfig.of(kind).kind is not DecoderKind.expert_head:
            raise ConfigurationError(f"the decoder {kind} cannot read a body with adapters, expected expert_head")
        decoder, batches = make_decoder(kind, self.code, self._indices(erased)), _batches(calibration)
        first = list(islice(batches, 1))
        for batch in first:
            self.count_classes(batch)
        if isinstance(decoder, ExpertHeadDecoder):
            decoder = make_decoder(decoder.config, self.code, decoder.erased, self.heads(*first))
        if decoder.needs_fit:
            decoder.fit(self._answers_with_own(decoder, chain(first, batches), None))
        self.decoders.pop(decoder.erased, None)
        self.decoders[decoder.erased] = decoder
        return self

    def decode(self, inputs: Batch, erased: Sequence[int | str] | None = None) -> Tensor:
        """Return the logits ``[|erased|, B, C]`` of lost experts; only servers that the decoder needs run.

        C is the largest of their class counts, for which all experts run once where there was no calibration. The
        logits of classes that an expert has not are −∞.
        """
        decoder, lost = self._decoder_of(erased)
        if isinstance(decoder, ExpertHeadDecoder) and not self._checked_heads:
            with eval_mode(self.coded), answering(self.coded, decoder.erased[0]):
                read = [self.coded[row] for row in decoder.rows(len(self.coded))]
                linear_heads(read, as_input(inputs, read[0]))
            self._checked_heads = True
        places = [decoder.erased.index(expert) for expert in lost]
        if self.is_adapted:  # every lost expert's answer is another pass
            each = [decoder.decode(self._answers_for(decoder, inputs, tasks=expert)) for expert in lost]
            decoded = torch.stack([every[place] for every, place in zip(each, places, strict=True)])
        else:
            decoded = decoder.decode(self._answers_for(decoder, inputs))[places]
        widths = [self.count_classes(inputs)[expert] for expert in lost]
        for logits, width in zip(decoded, widths, strict=True):
            logits[:, width:] = -torch.inf
        return decoded[..., : max(widths)]

    def score(self, decoded: Tensor, erased: Sequence[int | str] | None = None) -> Tensor:
        """Return the score ``[|erased|, B]`` of decoded logits: `coin.answer_score` over the expert's own classes."""
        _, lost = self._decoder_of(erased)
        widths = dict(enumerate(self.classes or []))
        return torch.stack([answer_score(logits[:, : widths.get(j)]) for j, logits in zip(lost, decoded, strict=True)])

    def accept(
        self, alpha: float, confidence: float = 0.95, *, inputs: Iterable[Any],
        erased: Sequence[int | str] | None = None, tasks: Tensor | Sequence[int] | None = None,
    ) -> list[Promise]:  # fmt: skip
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

    def accepted(self, decoded: Tensor, erased: Sequence[int | str] | None = None) -> Tensor:
        """Return which decoded logits are accepted, bool ``[|erased|, B]``; DecodingError before `accept`."""
        decoder, lost = self._decoder_of(erased)
        each = zip(lost, self.score(decoded, erased), strict=True)
        return torch.stack([decoder.accepted(expert, score) for expert, score in each])

    def save(self, path: str | Path) -> None:
        """Write code, coded models, fitted decoders and the experts' fingerprints to one safetensors file.

        Compressed coded models are written as they run: packed, or where they are deltas from a base whole, since the
        base is in no file of the system; `nbytes` after `load` is then that of whole networks.
        """
        experts = [fingerprint(expert.state_dict()) for expert in self.experts]
        coded, bodies = [all_tensors(network) for network in self.coded], [Body.of(network) for network in self.coded]
        decoders = list(self.decoders.values())
        SystemFile(self.code, self.names, self.classes, decoders, experts, coded, bodies).save(Path(path))

    @classmethod
    def load(cls, path: str | Path, experts: Networks, forward: Forward | None = None) -> Self:
        """Return the system that `save` wrote with these experts; its answers are identical to the last bit.

        Raises FileError where the file is missing, damaged or holds something else, StateError where the experts are
        others or tensors do not fit.
        """
        return cls._of_file(SystemFile.load(Path(path)), str(path), experts, forward)

    @classmethod
    def from_run(
        cls, folder: str | Path, method: str | None = None, decoder: str | None = None, survivors: bool | None = None
    ) -> Self:
        """Return a coded system that an experiment has evaluated, with its decoders and promises.

        Args:
            folder: An experiment's folder, whose first seed is taken, or a seed's.
            method: The method's name in the results, or that of its variant, as tables and files have it.
            decoder: The decoder's name in the results; by default the pair that `recommended` says of those that fit.
            survivors: Whether the decoder reads survivors; None takes either.

        Raises what `load` does, and ConfigurationError where there are no such results.
        """
        seeds, every_row = read_run(Path(folder))
        seed = seeds[0]
        frame = read_results(seed)
        systems: list[tuple[Path, str, pd.DataFrame]] = []
        for path in sorted((seed / "systems").glob("*.safetensors")):
            made, policies = load_provenance(path), frame["batchnorm"].map(requested_policy)
            own = frame[(frame["method"] == made["method"]) & (policies == made["batchnorm"])]
            systems += [(path, str(name), rows) for name, rows in own.groupby("decoder", sort=False)]
        asked = [each for each in systems if decoder in (None, each[1])]
        if method is not None:
            asked = [
                each for each in asked if method in (each[2]["method"].iloc[0], _variant_of(each[2]), each[0].stem)
            ]
        asked = [each for each in asked if survivors in (None, DecoderConfig.named(each[1]).reads_survivors)]
        if not asked:
            known = ", ".join(f"{path.stem} with {name}" for path, name, _ in systems) or "none"
            kinds = {True: "reads the survivors, such as ridge,", False: "reads none, such as expert_head,"}
            kind = "one" if survivors is None else f"a decoder that {kinds[survivors]}"
            told = f"found method '{method or '*'}' with decoder '{decoder or '*'}', expected {kind}"
            raise ConfigurationError(f"{told} that '{seed}' has results and systems of: {known}")
        path, name, rows = _recommended_of(asked, stand_ins(summarise(every_row)))
        file = SystemFile.load(path)
        file.decoders = [each for each in file.decoders if each.config.name == name]
        opened = [load_network(seed / "experts" / task / "expert.safetensors") for task in file.names]
        system = cls._of_file(file, str(path), [each.network for each in opened], None)
        system.method, system.batchnorm = file.told["method"], file.told["batchnorm"]
        system.results, system.files = rows, (*(each.path for each in opened), *file.coded_files)
        system.class_names = [list(map(str, e.provenance.get("classes") or range(e.num_classes))) for e in opened]
        return system

    @classmethod
    def _of_file(cls, file: SystemFile, path: str, experts: Networks, forward: Forward | None) -> Self:
        if len(experts) != len(file.experts):
            raise ConfigurationError(f"found {len(experts)} experts, expected the {len(file.experts)} of '{path}'")
        for place, (expert, expected) in enumerate(zip(experts, file.experts, strict=True)):
            if fingerprint(expert.state_dict()) != expected:
                raise StateError(f"expert {place} is not the one that '{path}' was saved with; give those experts")
        networks: list[nn.Module | Compressed] = [open_network(each).kept for each in file.coded_files]
        for row, own in enumerate(file.coded):
            like, body = of_one_width(experts)[0], file.bodies[row]
            network = clone(like).eval() if body is None else body.network(like, own)
            check_layout(all_tensors(network), own, f"coded model {row} of {path}")
            fill(network, own)
            networks.append(network)
        system = cls(file.code, experts, networks, file.names, forward)
        system.decoders, system.classes = {decoder.erased: decoder for decoder in file.decoders}, file.classes
        return system

    def _indices(self, erased: Sequence[int | str]) -> tuple[int, ...]:
        """Return experts that are given by index or by name."""
        if not isinstance(erased, Sequence) or isinstance(erased, str):
            raise ConfigurationError(f"found erased={erased!r}, expected a list of lost experts; give [{erased!r}]")
        known: dict[int | str, int] = {each: i for i, name in enumerate(self.names) for each in (i, name)}
        if unknown := [each for each in erased if each not in known]:
            expected = f"0 to {len(self.experts) - 1}, or one of {', '.join(self.names)}"
            raise ConfigurationError(f"found lost expert {unknown[0]!r}, expected {expected}")
        return tuple(known[each] for each in erased)

    def _decoder_of(self, erased: Sequence[int | str] | None) -> tuple[Decoder, tuple[int, ...]]:
        """Return the decoder of lost experts, and these, by default those of the last `fit_decoder`."""
        key = next(reversed(self.decoders), ()) if erased is None else self._indices(erased)
        fits = (  # in any order, and one that reads no survivor is for any of its experts
            own
            for each, own in self.decoders.items()
            if sorted(each) == sorted(key) or (not own.config.reads_survivors and {*key} <= {*each})
        )
        decoder = self.decoders.get(key) or (next(fits, None) if key else None)
        if decoder is None:
            lost = "" if erased is None else f" of the loss of {list(erased)}"
            ready = f", only of {', '.join(str(list(each)) for each in self.decoders)}" if self.decoders else ""
            raise ConfigurationError(f"found no decoder{lost}{ready}; call fit_decoder with the lost experts first")
        return decoder, key

    def _answers_for(
        self, decoder: Decoder, inputs: Batch, own: Sequence[int] = (), tasks: int | Tensor | None = None
    ) -> Answers:
        """Return the answers that a decoder needs, and these experts' own."""
        idle = {*range(decoder.num_experts)} - {*decoder.survivors, *own}
        silent = {*range(len(self.coded))} - {*decoder.rows(len(self.coded))}
        features = decoder.config.reads_features
        return self.answers(inputs, features=features, erased=[*idle], silent=[*silent], tasks=tasks)

    def _answers_with_own(
        self, decoder: Decoder, batches: Iterable[Batch], tasks: Tensor | Sequence[int] | None
    ) -> Answers:
        """Return what a decoder needs and the lost experts' own answers, with the inputs' tasks if these are given."""
        told, parts = None if tasks is None else torch.as_tensor(tasks), list[Answers]()
        if self.is_adapted and told is None:
            expected = "expected of which expert's task each input is, for bodies with adapters"
            raise ConfigurationError(f"found no tasks, {expected}; give tasks=[0, 0, …, 1, …], a number for each input")
        for batch in batches:
            done = sum(each.num_samples for each in parts)
            own = None if told is None else told[done : done + size_of(as_input(batch, self.coded[0]))]
            parts.append(self._answers_for(decoder, batch, decoder.erased, own))
        return replace(Answers.concatenate(parts), tasks=told)

    @torch.no_grad()
    def count_classes(self, inputs: Any) -> list[int]:
        """Return every expert's number of logits, and keep it as `classes`."""
        if self.classes is None:
            with eval_mode(self.experts):
                each = [(expert, take(as_input(inputs, expert), slice(0, 2))) for expert in self.experts]
                self.classes = [run_network(expert, sample, False).logits.shape[1] for expert, sample in each]
        return self.classes


def _variant_of(rows: pd.DataFrame) -> str:
    """Return the name of the variant that all rows are of, without a set of coded models."""
    return str(variant_names(rows).iloc[0]).partition("[")[0]


def _recommended_of(
    systems: Sequence[tuple[Path, str, pd.DataFrame]], kept: pd.DataFrame
) -> tuple[Path, str, pd.DataFrame]:
    """Return the system, of a file, a decoder and its rows, that is recommended of these among `stand_ins`.

    Results from before memory was measured have no stand-ins: of these it is the most accurate.
    """
    pairs = [(_variant_of(rows), name) for _, name, rows in systems]
    variants = kept["name"].str.partition("[")[0]
    own = [pair in pairs for pair in zip(variants, kept["decoder"], strict=True)]
    if not any(own):
        return max(systems, key=lambda each: float(each[2]["decoded_accuracy"].mean()))
    row = recommended(kept[own])
    return systems[pairs.index((row["name"].partition("[")[0], row["decoder"]))]


def _called_by(network: nn.Module, forward: Forward | None) -> nn.Module:
    """Return a network that is called by a user's function, if there is one."""
    if forward is not None and isinstance(network, Adapted):
        return network.with_forward(forward)
    return called_by(network, forward)


def _batches(inputs: Iterable[Any]) -> Iterator[Any]:
    """Return an iterator; a DataError for a single batch."""
    if isinstance(inputs, Tensor | Mapping):
        raise DataError(f"found a {type(inputs).__name__}, expected batches of inputs, such as a loader; give [inputs]")
    return iter(inputs)
