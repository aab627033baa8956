"""The code as a check of servers that answer in time, but wrongly."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coin.coding.answers import Answers
from coin.coding.code import Code
from coin.coding.decoder import Decoder
from coin.errors import DecodingError


def parity_residual(code: Code, answers: Answers) -> Tensor:
    """Return how far the coded models' answers to each input are from Σβ_if_i ``[B]``: a root mean square.

    The experts all have answered. Far outside what it is on calibration inputs (`parity_significance`), some server
    answers wrongly, though in time.

    >>> own = torch.randn(3, 5, 4)
    >>> answers = coin.Answers(own, code.encode(own))
    >>> own[0, 4] += 3  # expert 0 goes wrong at the last input
    >>> coin.parity_residual(code, answers).gt(0.1).tolist()
    [False, False, False, False, True]
    """
    if answers.num_coded != code.num_coded:
        raise DecodingError(f"found {answers.num_coded} coded models' answers, the code has {code.num_coded}; give all")
    return (answers.coded - code.encode(answers.experts)).double().square().mean((0, 2)).sqrt()


def parity_significance(residual: Tensor, calibration: Tensor) -> Tensor:
    """Return what share of the residuals of calibration inputs ``[P]`` are as large ``[B]``, in 1/(P + 1) … 1.

    Both are `parity_residual`'s. Of inputs like the calibration's and servers that work, a share s has at most s.

    >>> coin.parity_significance(torch.tensor([0.5, 9.0]), torch.arange(1.0, 10.0)).tolist()
    [1.0, 0.20000000298023224]
    """
    ranked = calibration.sort().values
    return (1 + len(ranked) - torch.searchsorted(ranked, residual)) / (1 + len(ranked))


def fault_score(decoders: Sequence[Decoder], answers: Answers, calibration: Answers) -> Tensor:
    """Return how much every expert's own answers disagree with those decoded from the others ``[N]``.

    Expert j's is the root mean square of f̂_j − f_j over the inputs, relative to the same on calibration inputs, about
    1 where all servers work. Where the parity fails, the expert with the largest is the suspect.

    Args:
        decoders: For every expert a fitted one that loses it alone. The linear decoder of one coded model finds every
            expert equally odd: its equation is the same for all. ``feature_ridge`` tells them apart.
        answers: Those of all experts and coded models.
        calibration: Theirs to inputs on which all servers work, other than the decoders were fitted on.

    >>> own = torch.randn(3, 200, 4)
    >>> answers = coin.Answers(own, code.encode(own) + 0.1 * torch.randn(1, 200, 4))
    >>> new = answers.select(slice(100))
    >>> decoders = [coin.make_decoder("ridge", code, [j]).fit(answers.select(slice(100, 200))) for j in range(3)]
    >>> own[1, 100:] += torch.randn(100, 4)
    >>> int(coin.fault_score(decoders, answers, new).argmax())
    1
    """
    if [decoder.erased for decoder in decoders] != [(expert,) for expert in range(answers.num_experts)]:
        raise DecodingError(f"found decoders that lose {[d.erased for d in decoders]}, expected each expert alone")
    wrong, usual = (
        torch.stack([(each.decode(seen)[0] - seen.experts[j]).double().norm() for j, each in enumerate(decoders)])
        / seen.num_samples**0.5
        for seen in (answers, calibration)
    )
    scores: Tensor = wrong / usual
    return scores
