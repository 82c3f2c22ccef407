"""Modules that operators stand for, and calls of modules that are replayed.

A model's modules hold its parameters and say what is computed. Where nobody holds on to one, by a hook, an adapter or
sharding, it need not be called: an operator may read its parameters (`is_plain`), and the launches of whole modules may
be repeated without the Python between them (`call_replayed`).
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from weakref import WeakKeyDictionary

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.module_tracker import ModuleTracker

from .ahead import compile_ahead
from .backend import autocast_dtype, resolve_backend
from .observers import is_observed, saves_for_others
from .replay import replay

__all__ = [
    "SETTINGS",
    "call_replayed",
    "compile_kernels",
    "is_itself",
    "is_plain",
    "is_plain_conv",
]


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is just its parameters, so that an operator which reads them may stand for it and others.

    It is not where somebody holds on to it: pruning, hooks, adapters, offloading and sharding change its class, its
    `forward` or its parameters' class, or add hooks. Then it must be called, as must one that was put in its place and
    has no bias, or no parameters. Hooks of all modules at once count as well, but for those of PyTorch's ModuleTracker,
    as in FlopCounterMode, where hooks are set for what autograd saves (checkpoints,
    `torch.autograd.graph.save_on_cpu`): they may be on in one of a checkpoint's two forward passes only, and it wants
    the same tensors saved in both. They change nothing, and are not told of the modules passed over.

    Args:
        module: Of a mixer.
        kind: The class that it was made as.
    """
    if type(module) is not kind or _is_hooked(module):
        return False
    return not any(p is None or is_traceable_wrapper_subclass(p) for p in module._parameters.values())


def is_plain_conv(conv: nn.Module, kind: type[nn.Module], padding: int = 0) -> bool:
    """`is_plain`, of a depth-wise convolution, for which an operator may stand that knows no other than this: each
    channel's own at every place, with so many zeros around."""
    if not is_plain(conv, kind):
        return False
    ones = (1,) * len(conv.kernel_size)
    return conv_settings(conv) == (ones, (padding,) * len(ones), ones, conv.in_channels, "zeros")


def conv_settings(conv: nn.Module) -> tuple:
    """What a convolution does with its weight; lists, which somebody may have set, as tuples."""
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return tuple(tuple(each) if isinstance(each, list) else each for each in settings)


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module does more than, or something else than, the `forward` of its class."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    hooked = before or after or module._backward_pre_hooks or module._backward_hooks
    if hooked or "forward" in module.__dict__:
        return True
    return torch_modules._has_any_global_hook() and not (saves_for_others() and _are_all_hooks_trackers())


def _are_all_hooks_trackers() -> bool:
    """Whether of the hooks of all modules at once each is one of a ModuleTracker."""
    hooks = itertools.chain(
        torch_modules._global_forward_pre_hooks.values(),
        torch_modules._global_forward_hooks.values(),
        torch_modules._global_backward_pre_hooks.values(),
        torch_modules._global_backward_hooks.values(),
    )
    return all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def compile_kernels(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Before a module's function is first called with such a tensor, in training and in inference: compile the kernels
    that its passes take, side by side (`vim2.ops.ahead`). Where somebody would see it called once more, each is
    compiled when it is launched, as ever."""
    if is_observed() or x.__class__ is not Tensor:
        return
    known = _compiled.setdefault(module, set())
    key = torch.is_grad_enabled(), autocast_dtype(x), x.dtype, x.device
    if key in known:
        return
    known.add(key)
    parameters = tuple(module.parameters())  # of which DataParallel's copies, new ones at each call, have none
    if not parameters or resolve_backend(None, x, scan=True) != "triton":
        return
    # one call more would change statistics or the like, which are buffers, and be seen by hooks, a tracker's too
    hooked = torch_modules._has_any_global_hook() or any(map(_is_hooked, module.modules()))
    if next(module.buffers(), None) is None and not hooked:
        compile_ahead(lambda x, *_: function(x), (x, *parameters))


_compiled: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()


def call_replayed(
    module: nn.Module, function: Callable, inputs: Sequence[Tensor], handed_on: int = 0
) -> Tensor | Sequence[Tensor]:
    """function(*inputs), replayed where that can be, see `vim2.ops.replay.replay`.

    Args:
        module: Whose `forward` calls this. The replays are its own.
        function: It reads no other tensors than this module's parameters and those of the modules inside it, and what
            `SETTINGS` has of their kinds.
        inputs: Tensors.
        handed_on: As for `replay`.
    """
    settings, parameters = [], []
    # of this module's own hooks, this runs in their midst
    if is_observed() or not _is_replayable(inputs) or not _read(module, settings, parameters, is_called=False):
        return function(*inputs)
    settings += (len(inputs), handed_on, torch.is_inference_mode_enabled(), autocast_dtype(inputs[0]))
    # parameters are read from the modules, too; given here, they are known by where they lie
    given = len(inputs)
    of_inputs = lambda *tensors: function(*tensors[:given])  # noqa: E731
    return replay(module, tuple(settings), of_inputs, (*inputs, *parameters), handed_on)


def _is_replayable(inputs: Sequence[Tensor]) -> bool:
    """Whether these are plain tensors, and operators on them, the scan too, are Triton's kernels."""
    if not inputs or any(t.__class__ is not Tensor or t.layout is not torch.strided for t in inputs):
        return False
    return resolve_backend(None, *inputs, scan=True) == "triton"


def _read(module: nn.Module, settings: list, tensors: list, is_called: bool = True) -> bool:
    """Collect all that a module's forward pass, and those of the modules inside it, depend on. Returns whether that is
    all: not where somebody holds on to one that is called (see `is_plain`)."""
    kind, parameters, modules = module.__class__, module._parameters, module._modules
    of_kind = SETTINGS.get(kind)
    if of_kind is None or module._buffers or module._compiled_call_impl is not None:
        return False
    if is_called and _is_hooked(module):
        return False
    # names, too: who takes a weight out and puts it back changes the order
    settings.append((kind, of_kind(module), tuple(parameters), tuple(modules)))
    for parameter in parameters.values():
        if parameter is not None and (parameter.__class__ is not nn.Parameter or parameter.layout is not torch.strided):
            return False
        tensors.append(parameter)
    for each in modules.values():  # noqa: SIM110  (a generator would take longer than what it asks for)
        if not _read(each, settings, tensors):
            return False
    return True


# What the forward passes of modules read besides tensors, of those that are replayed, alone or as a part of others.
# Each kind of a model's modules adds its own.
SETTINGS: dict[type[nn.Module], Callable[[nn.Module], Hashable]] = {
    nn.LayerNorm: lambda module: module.eps,
    nn.Conv1d: conv_settings,
    nn.Conv2d: conv_settings,
    nn.Linear: lambda module: None,
    nn.Identity: lambda module: None,
    nn.ModuleList: lambda module: None,
    DropPath: lambda module: (module.drop_prob, module.scale_by_keep, module.training),
}


def is_itself(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of a module is one of the `forward` of this class, and no more."""
    return type(module) is kind and module._compiled_call_impl is None and not _is_hooked(module)
