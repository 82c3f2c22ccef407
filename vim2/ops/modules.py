"""When a module need not be called: an operator reads its parameters instead, or what it does is replayed.

A model's modules hold its parameters and say what is computed. Where nobody holds on to a module, by a hook, an adapter
or sharding, an operator may read its parameters (`is_plain`), and the launches of whole modules may be repeated without
the Python between them (`call_replayed`).
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
    """Whether a module is nothing but its parameters, so that an operator may read them and the module is not called.

    It must be called where somebody holds on to it: pruning, hooks, adapters, offloading and sharding change its class,
    its `forward` or its parameters' class, or add hooks. So must a module that was put in its place and lacks a
    parameter. Hooks of all modules at once count as well (`torch.nn.modules.module.register_module_forward_hook`), with
    one exception: those of PyTorch's ModuleTracker, as FlopCounterMode sets it, while hooks are set for what autograd
    saves (checkpoints, `torch.autograd.graph.save_on_cpu`). The tracker may be on in only one of a checkpoint's two
    forward passes, which must save the same tensors. It changes nothing, and does not learn of the modules passed over.

    Args:
        module: A module of a mixer.
        kind: The class that the mixer made it of.
    """
    if type(module) is not kind or _is_hooked(module):
        return False
    return not any(p is None or is_traceable_wrapper_subclass(p) for p in module._parameters.values())


def is_plain_conv(conv: nn.Module, kind: type[nn.Module], padding: int = 0) -> bool:
    """Whether a module is plain (`is_plain`) and the depth-wise convolution that operators know: one channel a group,
    stride and dilation 1, padded with `padding` zeros at each end."""
    if not is_plain(conv, kind):
        return False
    ones = (1,) * len(conv.kernel_size)
    return conv_settings(conv) == (ones, (padding,) * len(ones), ones, conv.in_channels, "zeros")


def conv_settings(conv: nn.Module) -> tuple:
    """What a convolution does with its weight. Lists, which a user may have set, become tuples."""
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return tuple(tuple(each) if isinstance(each, list) else each for each in settings)


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module does anything but the `forward` of its class."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    hooked = before or after or module._backward_pre_hooks or module._backward_hooks
    if hooked or "forward" in module.__dict__:
        return True
    return torch_modules._has_any_global_hook() and not (saves_for_others() and _are_all_hooks_trackers())


def _are_all_hooks_trackers() -> bool:
    """Whether all hooks that are set for all modules at once are a ModuleTracker's."""
    hooks = itertools.chain(
        torch_modules._global_forward_pre_hooks.values(),
        torch_modules._global_forward_hooks.values(),
        torch_modules._global_backward_pre_hooks.values(),
        torch_modules._global_backward_hooks.values(),
    )
    return all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def compile_kernels(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Compile the kernels that a module's function and its backward pass launch, side by side (`vim2.ops.ahead`),
    before its first call of a kind: in training or inference, with or without autocast, on a device.

    That takes a call whose results are thrown away. Where somebody would notice it, nothing is done here, and each
    kernel is compiled when it is first launched.
    """
    if is_observed() or x.__class__ is not Tensor:
        return
    known = _compiled.setdefault(module, set())
    key = torch.is_grad_enabled(), autocast_dtype(x), x.dtype, x.device
    if key in known:
        return
    known.add(key)
    parameters = tuple(module.parameters())  # DataParallel's copies, made anew at each call, have none
    if not parameters or resolve_backend(None, x, scan=True) != "triton":
        return
    # a further call would change statistics and the like, which are buffers, and be seen by hooks
    hooked = torch_modules._has_any_global_hook() or any(map(_is_hooked, module.modules()))
    if next(module.buffers(), None) is None and not hooked:
        compile_ahead(lambda x, *_: function(x), (x, *parameters))


_compiled: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()


def call_replayed(
    module: nn.Module, function: Callable, inputs: Sequence[Tensor], handed_on: int = 0
) -> Tensor | Sequence[Tensor]:
    """function(*inputs), replayed where possible, see `vim2.ops.replay.replay`.

    Args:
        module: The module whose `forward` calls this. It owns the replays.
        function: It reads nothing but its inputs, the parameters of this module and of those inside it, and what
            `SETTINGS` names of their classes.
        inputs: Tensors.
        handed_on: As for `replay`.
    """
    settings, parameters = [], []
    # this runs inside a call of the module, so its own hooks see that call in any case: is_called=False
    if is_observed() or not _is_replayable(inputs) or not _read(module, settings, parameters, is_called=False):
        return function(*inputs)
    settings += (len(inputs), handed_on, torch.is_inference_mode_enabled(), autocast_dtype(inputs[0]))
    # parameters are read from the modules, too; given here, they are known by where they lie
    given = len(inputs)
    of_inputs = lambda *tensors: function(*tensors[:given])  # noqa: E731
    return replay(module, tuple(settings), of_inputs, (*inputs, *parameters), handed_on)


def _is_replayable(inputs: Sequence[Tensor]) -> bool:
    """Whether these are plain tensors, on which all operators, the scan too, run as Triton's kernels."""
    if not inputs or any(t.__class__ is not Tensor or t.layout is not torch.strided for t in inputs):
        return False
    return resolve_backend(None, *inputs, scan=True) == "triton"


def _read(module: nn.Module, settings: list, tensors: list, is_called: bool = True) -> bool:
    """Collect the settings and tensors that a module's forward pass depends on, with those of the modules inside it.

    Returns:
        Whether it depends on nothing else. It may where a class is not in `SETTINGS`, where a module has buffers or is
        compiled by itself, and where somebody holds on to one that is called (see `is_plain`).
    """
    kind, parameters, modules = module.__class__, module._parameters, module._modules
    of_kind = SETTINGS.get(kind)
    if of_kind is None or module._buffers or module._compiled_call_impl is not None:
        return False
    if is_called and _is_hooked(module):
        return False
    # with names, since taking a weight out and putting it back changes the order
    settings.append((kind, of_kind(module), tuple(parameters), tuple(modules)))
    for parameter in parameters.values():
        if parameter is not None and (parameter.__class__ is not nn.Parameter or parameter.layout is not torch.strided):
            return False
        tensors.append(parameter)
    for each in modules.values():  # noqa: SIM110  (a generator would take longer than what it asks for)
        if not _read(each, settings, tensors):
            return False
    return True


# What the forward pass of a module reads besides tensors, by class, of all that are replayed, alone or inside others.
# The models' classes add theirs where they are defined.
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
    """Whether a call of a module is a call of the `forward` of this class, and nothing more."""
    return type(module) is kind and module._compiled_call_impl is None and not _is_hooked(module)
