"""A pretend accelerator: tensors that say ``pretend:0``, are computed on the CPU, and refuse what CUDA refuses.

    device = pretend.register()                # once in a process
    with pretend.running() as seen:            # or running(float64=False): as on Apple's MPS
        network.to(device); ...
    assert "merging/units.py" in seen          # the files of coin that ran a kernel on it

It is torch's own place for further backends (PrivateUse1), with a backend in Python, so that autograd's engine, which
runs a backward pass of a device in a thread of its own, works as it does on a GPU. A `PretendTensor` holds a CPU
tensor. `_run` checks each ATen operation, below autograd, before it is done on the tensors inside:

- Tensors of both devices together raise torch's error but in copies, even a CPU tensor without dimensions, which CUDA
  would take.
- Generators must be of the output's device; ``numpy()`` raises; with ``float64=False`` there is no float64.

It knows nothing of memory, streams, waits, TF32 or processes.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import coin

NAME = "pretend"
PACKAGE = f"{Path(coin.__file__).parent}{os.sep}"  # lines of files below are blamed
CPU = torch.device("cpu")
ANOTHER = "Expected all tensors to be on the same device, but found at least two devices, pretend:0 and cpu!"
aten = torch.ops.aten

_COPIES = {
    aten.copy_.default, aten._to_copy.default, aten.copy.default, aten._copy_from.default,
    aten._foreach_copy_.default, aten._has_compatible_shallow_copy_type.default, aten.is_set_to.default,
}  # fmt: skip


_library = torch.library.Library("aten", "IMPL")
_seen: set[str] = set()
_has_float64 = True


class PretendTensor(Tensor):
    """A CPU tensor that passes for one of the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, inner):
        assert type(inner) is Tensor
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force=False):
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            "can't convert pretend:0 device type tensor to numpy. Use Tensor.cpu() to copy it first."
        )

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError(
                "Only Tensors created explicitly by the user support the deepcopy protocol"
            )
        with torch.no_grad():
            made = PretendTensor(self.inner.detach().clone())
        if isinstance(self, nn.Parameter):
            made._is_param = True
        made.requires_grad_(self.requires_grad)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol):
        return self.inner.detach().__reduce_ex__(protocol)


def _run(function, args, kwargs):
    """Check an operation, count it, and run it on the tensors inside."""
    leaves = tree_leaves((args, kwargs))
    tensors = [each for each in leaves if isinstance(each, Tensor)]
    ours = [each for each in tensors if isinstance(each, PretendTensor)]
    asked = kwargs.get("device")
    if not ours and not _is_ours(asked):
        _check_generators(leaves, "cpu")
        return function(*args, **kwargs)

    is_factory = asked is not None and len(tensors) <= 1
    if len(ours) < len(tensors) and function not in _COPIES and not is_factory:
        raise RuntimeError(f"{ANOTHER} ({function})")
    _check_generators(leaves, NAME)
    target = NAME if asked is None else torch.device(asked).type
    if function is aten.copy_.default:
        target = args[0].device.type
    if target == NAME and not _has_float64:
        _check_types(function, leaves, kwargs)
    if function is aten._fused_sdp_choice.default:
        return 0  # the plain kernels
    if target == NAME and function not in _COPIES and not function.is_view:
        _blame()

    inner_args, inner_kwargs = tree_map(_inside, (args, kwargs))
    if "pin_memory" in inner_kwargs:
        inner_kwargs["pin_memory"] = False
    found = function(*inner_args, **inner_kwargs)
    if target != NAME:
        return found
    wrapper_of = {id(each.inner): each for each in ours}

    def wrapped(tensor):
        if id(tensor) in wrapper_of:  # changed in place
            return wrapper_of[id(tensor)]
        with torch.inference_mode(False):  # an inference tensor could not be detached
            return PretendTensor(tensor)

    return tree_map_only(Tensor, wrapped, found)


def _inside(value):
    """Return the CPU tensor of a tensor of the device, and the CPU for the device."""
    if isinstance(value, PretendTensor):
        return value.inner
    if isinstance(value, torch.device) and value.type == NAME:
        return CPU
    return value


def _is_ours(device):
    return device is not None and torch.device(device).type == NAME


def _check_generators(leaves, device):
    for each in leaves:
        if isinstance(each, torch.Generator) and each.device.type != device:
            found = f"found '{each.device.type}'"
            raise RuntimeError(f"Expected a '{device}' device type for generator but {found}")


def _check_types(function, leaves, kwargs):
    """Raise what MPS raises for float64."""
    wide = (torch.float64, torch.complex128)
    is_wide = any(each in wide for each in leaves if isinstance(each, torch.dtype))
    if function is aten._to_copy.default and kwargs.get("dtype") is None:
        is_wide = any(each.dtype in wide for each in leaves if isinstance(each, Tensor))
    if is_wide:
        raise TypeError(
            "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
        )


def _blame():
    """Note the innermost file of coin's code; autograd's thread and Lightning have none."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            _seen.add(name.removeprefix(PACKAGE))
            return
        frame = frame.f_back


class _Mode(TorchDispatchMode):
    """Catches what makes tensors of the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled():  # where composite operations arrive whole
            with self:
                found = function.decompose(*args, **kwargs or {})
            if found is not NotImplemented:
                return found
        return _run(function, args, kwargs or {})


class _Backend:
    """What torch asks ``torch.pretend``."""

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def set_device(self, device):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass


class PretendAccelerator(pl.accelerators.Accelerator):
    """The device for Lightning: ``trainer.accelerator: pretend``."""

    def setup_device(self, device):
        pass

    def teardown(self):
        pass

    def get_device_stats(self, device):
        return {}

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return NAME


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return PretendTensor(
        torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format)
    )


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, into, non_blocking=False):
    inner, place = (
        each.inner if isinstance(each, PretendTensor) else each for each in (source, into)
    )
    place.copy_(inner)
    return into


_choose = _AcceleratorConnector._choose_strategy


def _choose_strategy(connector):
    """As Lightning does, which knows of no other accelerators than its own that they are one device."""
    is_ours = connector._accelerator_flag == NAME
    return SingleDeviceStrategy(torch.device(NAME, 0)) if is_ours else _choose(connector)


def register() -> torch.device:
    """Register the device with torch and Lightning, once in a process, and return it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    # Autograd's thread, where `_Mode` is not, makes tensors too.
    _library.impl("empty.memory_format", _empty, "PrivateUse1")
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")
    pl.accelerators.AcceleratorRegistry.register(NAME, PretendAccelerator, override=True)
    _AcceleratorConnector._choose_strategy = _choose_strategy
    return torch.device(NAME, 0)


_apply = nn.Module._apply


def _moved(module, function, recurse=True):
    """As ``Module._apply``, with parameters that stay the same objects, as they do when they go to a GPU."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return _apply(module, function, recurse)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


@contextmanager
def running(*, float64: bool = True) -> Iterator[set[str]]:
    """Run a block in which the device is there; return the files of coin that run kernels on it, as they do."""
    global _seen, _has_float64
    _seen, _has_float64 = set(), float64
    apply, nn.Module._apply = nn.Module._apply, _moved
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` is made on the CPU first
    try:
        with _Mode():
            yield _seen
    finally:
        _has_float64 = True
        torch._C._set_only_lift_cpu_tensors(lifts)
        nn.Module._apply = apply
