"""Choice among options by the error of decoded answers on held-out calibration samples."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from coin.coding import Answers, DecoderConfig, DecoderKind, make_decoder, uniform
from coin.errors import CoinWarning, HeadError, NumericalError
from coin.merging.experts import Experts

LINEAR = DecoderConfig(DecoderKind.linear)

FEW = 10  # with fewer held-out samples a choice is little better than chance, and a warning says so

Option = TypeVar("Option")


def choose(
    options: Sequence[Option],
    build: Callable[[Option], nn.Module],
    experts: Experts,
    row: Sequence[float],
    label: str,
    decoders: Sequence[DecoderConfig] = (LINEAR,),
    handicap: Callable[[Option], float] = lambda _: 1.0,
) -> tuple[Option, list[float]]:
    """Return the option whose trial has the smallest `held_out_error`, and every option's error.

    A single option is not tried, and has no error; of equally good ones the first is taken. `build` maps an option to
    its coded model, made without the held-out samples; `handicap` to a factor on its error. With fewer than `FEW`
    held-out samples there is a warning. Raises NumericalError if no error is finite.
    """
    if len(options) == 1:
        return options[0], []
    errors = [held_out_error(experts, build(option), row, decoders) for option in options]
    if (held_out := experts.split[1].num_samples) < FEW:
        told = f"method '{label}' chose by {held_out} held-out calibration samples, expected at least {FEW}"
        warnings.warn(f"{told}; raise samples_per_task, or set its options", CoinWarning, stacklevel=2)
    if not any(map(math.isfinite, errors)):
        found = f"the outputs of method '{label}' on held-out calibration samples are not finite"
        raise NumericalError(f"{found}; check the experts' outputs")
    compared = [handicap(option) * error for option, error in zip(options, errors, strict=True)]
    return options[compared.index(min(compared))], errors


def held_out_error(
    experts: Experts, coded: nn.Module, row: Sequence[float], decoders: Sequence[DecoderConfig] = (LINEAR,)
) -> float:
    """Return the mean cosine distance of decoded answers to the experts' own on held-out samples, in [0, 2].

    That is the mean over tasks j and decoders of E_{x∈T_j} (1 − cos(f̂_j(x), f_j(x))), with f̂_j what is decoded when
    expert j is lost, and logits less their mean over the classes: size and offset do not change which class an answer
    names, while the squared error ‖f_c − Σ_i β_i f_i‖ prefers outputs that have shrunk. Decoders are fitted on the
    other samples; with fewer than two of a task only the linear one judges, and expert_head judges only where heads
    give the logits, unless it is alone. Infinite if it is no number.
    """
    fitted = experts.tasks[: experts.split[0].num_samples]
    if int(torch.bincount(fitted, minlength=experts.count).min()) < 2:
        decoders = [LINEAR]
    others = [each for each in decoders if each.kind is not DecoderKind.expert_head]
    try:
        heads = experts.heads if len(others) < len(decoders) else None
    except HeadError:
        if not others:
            raise
        heads, decoders = None, others
    features = any(each.reads_features for each in decoders)
    judged, calibration = _answers(experts, coded, 1, features), None
    assert judged.tasks is not None
    own = {task: (judged.tasks == task).nonzero().flatten() for task, share in enumerate(row) if share > 0}
    if not any(len(samples) for samples in own.values()):  # few samples, all of tasks that have no share
        own = dict.fromkeys(own, torch.arange(judged.num_samples))
    errors = []
    for task, samples in own.items():
        for config in decoders if len(samples) else ():
            mine, truth = judged.select(samples), judged.experts[task, samples]
            if config.kind is DecoderKind.linear:
                rest = (weight * mine.experts[i] for i, weight in enumerate(row) if i != task)
                decoded = (mine.coded[0] - sum(rest, torch.zeros(()))) / row[task]
            else:
                decoder = make_decoder(config, uniform(experts.count), [task], heads)
                if decoder.needs_fit:
                    calibration = calibration or _answers(experts, coded, 0, features).with_kernels()
                    decoder.fit(calibration)
                decoded = decoder.decode(mine)[0]
            errors.append(_turned(decoded, truth))
    error = float(torch.stack(errors).mean())
    return error if math.isfinite(error) else math.inf


def _turned(decoded: Tensor, truth: Tensor) -> Tensor:
    """Return the mean of 1 − cos between logits ``[P, C]``, taken from their mean over the classes."""
    if decoded.shape[1] > 1:
        decoded, truth = (each - each.mean(1, keepdim=True) for each in (decoded, truth))
    return 1 - torch.cosine_similarity(decoded, truth).mean()


def _answers(experts: Experts, coded: nn.Module, part: int, features: bool) -> Answers:
    """Return the answers of experts and coded model to a part of `Experts.split`, logits in float64."""
    runs = [*experts.runs(part, features), experts.run(coded, experts.split[part], features)]
    start, samples = part * experts.split[0].num_samples, len(runs[-1].logits)
    tasks = experts.tasks[start : start + samples].to(runs[-1].logits.device)
    return Answers.of_servers([(run.features, run.logits.double()) for run in runs], experts.count, tasks)
