"""One affine unit of a network refitted in closed form: a weighted ridge regression for each group."""

from math import prod

import torch
from torch import Tensor, nn

from coin.merging.units import Unit
from coin.networks.compressed import Rounding
from coin.statistics.rules import Call
from coin.statistics.rules.convolution import ConvolutionCall, Geometry
from coin.statistics.rules.elementwise import ElementwiseCall
from coin.statistics.rules.linear import LinearCall
from coin.statistics.solvers import fit_affine
from coin.statistics.sums import sum_type


def output_rows(call: Call, output: Tensor, samples: int, places: Tensor | None) -> Tensor:
    """Return a call's outputs for P samples at positions `places` [P, q] of each, none for all, as rows [P·q, ·]."""
    if isinstance(call, ElementwiseCall):
        whole = (1,) * (output.ndim - 1 - len(call.shape)) + call.shape
        entries = [1 + place for place, size in enumerate(whole) if size > 1]
        positions = [place for place in range(1, output.ndim) if place not in entries]
        rows = _at(output.permute(0, *positions, *entries), len(positions), samples, places)
    else:
        last = output.movedim(1, -1) if isinstance(call, ConvolutionCall) else output
        rows = _at(last, output.ndim - 2, samples, places)
    return rows.flatten(1) if rows.ndim > 1 else rows[:, None]


def input_rows(call: Call, samples: int, places: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what a call's weight multiplies at the same positions [G, P·q, K'], and by which entries of a row [K']."""
    if isinstance(call, ConvolutionCall):
        return _patches(call.inputs, call.geometry, samples, places)
    if isinstance(call, ElementwiseCall):
        assert call.normalised is not None
        rows = output_rows(call, call.normalised(call.inputs), samples, places).T[..., None]
    else:
        rows = output_rows(call, call.inputs, samples, places)[None]
    return rows.to(sum_type(rows)), torch.arange(rows.shape[2], device=rows.device)


def _patches(inputs: Tensor, geometry: Geometry, samples: int, places: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return `input_rows` of images [P·k, C, *size], tap by tap, without the taps that meet no image."""
    size, channels, groups = tuple(inputs.shape[2:]), inputs.shape[1], geometry.groups
    each, outputs = len(inputs) // samples, prod(geometry.output_size(size))
    if places is None:
        places = torch.arange(each * outputs, device=inputs.device)[None]
    met, inside = geometry.met(places % outputs, size)
    entries = torch.arange(channels // groups * met.shape[2], device=inputs.device).view(-1, met.shape[2])
    alive = inside.flatten(0, 1).any(0)
    alive[0] |= ~alive.any()  # one of zeros, where no tap meets an image
    met, entries = (places // outputs)[..., None] * prod(size) + met[..., alive], entries[:, alive].T.flatten()
    met = met.expand(samples, -1, -1)  # [P, q, taps]
    inside = inside[..., alive].expand_as(met).flatten(0, 1)
    images = inputs.reshape(samples, each, channels, -1).movedim(2, 0).flatten(2)  # [C, P, k · places]
    if groups == 1 and met.shape[2] > 1:
        rows = images.movedim(0, 2).flatten(0, 1)
        first = images.shape[2] * torch.arange(samples, device=inputs.device)[:, None, None]
        found = rows.to(sum_type(rows)).index_select(0, (first + met).flatten()).view(*inside.shape, channels)
        found[~inside] = 0
        return found.flatten(1)[None], entries
    found = images.gather(2, met.flatten(1).expand(channels, -1, -1)).view(channels, *inside.shape)
    if not bool(inside.all()):
        found *= inside
    found = found.view(groups, -1, *inside.shape).movedim(1, 3)
    return found.to(sum_type(found)).flatten(2), entries


def _at(x: Tensor, dims: int, samples: int, places: Tensor | None) -> Tensor:
    """Return x [P·k, *positions, …], with so many dimensions of positions, at places [P, q] of these: [P·q, …]."""
    if places is None:
        return x.reshape(-1, *x.shape[1 + dims :])
    each = len(x) // samples
    row, *position = torch.unravel_index(places, (each, *x.shape[1 : 1 + dims]))
    first = each * torch.arange(samples, device=places.device)[:, None]
    return x[(first + row, *position)].flatten(0, 1)


def fit_unit(
    network: nn.Module,
    unit: Unit,
    call: Call,
    target: Tensor,
    places: Tensor | None,
    shares: Tensor,
    ridge: float,
    rounding: Rounding | None = None,
) -> None:
    """Refit a unit in place to targets [P, q, ·], at the call of its map in a forward pass of P samples.

    Places are as for `output_rows`, shares the rows' weights [P, q], and the ridge is relative. With a rounding, which
    takes the weight, the matrix is rounded, and the bias fitted to what that leaves.
    """
    weight = network.get_parameter(unit.weight)
    turned = isinstance(call, LinearCall) and call.transposed  # the weight is [K, O]
    shift = None if unit.shift is None else network.get_parameter(unit.shift)
    inputs, entries = input_rows(call, len(shares), places)
    flat = (weight.T if turned else weight).reshape(len(inputs), -1, unit.unknowns)

    def rounded(step: Tensor, metric: Tensor) -> Tensor:
        assert rounding is not None
        whole = metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(unit.unknowns).to(metric)
        whole[:, entries[:, None], entries] = metric
        return rounding.step(unit.weight, weight, _placed(step, entries, flat), whole, turned)[..., entries]

    outputs = inputs @ flat[..., entries].to(inputs).mT
    added = call.bias if shift is None else shift  # a bias that is computed of other tensors stays
    if added is not None:
        outputs += added.to(inputs).reshape(len(inputs), 1, -1)
    residual = target.view(outputs.shape[1], len(inputs), -1).transpose(0, 1) - outputs
    ridge, change = ridge * len(entries) / unit.unknowns, None if rounding is None else rounded
    step, constant = fit_affine(inputs, residual, shares.flatten(), ridge, intercept=shift is not None, change=change)
    if rounding is not None:
        weight.copy_(rounding.weight(unit.weight))
    else:
        step = _placed(step, entries, flat).flatten(0, 1)
        weight.add_((step.T if turned else step).reshape(weight.shape))
    if shift is not None:
        shift.add_(constant.reshape(shift.shape))


def _placed(step: Tensor, entries: Tensor, flat: Tensor) -> Tensor:
    """Return a step of some entries [G, O, K'] as one of all [G, O, K], zero elsewhere."""
    whole = step.new_zeros(flat.shape)
    whole[..., entries] = step
    return whole
