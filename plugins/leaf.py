"""Adapt or replace leaf modules, decide whether their weights may be read, share constants, make nodes of torch.fx.

A replaced module is kept in an attribute of its replacement, outside of torch's registry: it is absent from
`parameters()` and `state_dict()`, but present in copies and pickles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, wraps
from itertools import chain
from typing import Any, ClassVar, TypeVar

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as modules

from smallvit.plugins.base import ORIGINAL, original

PLUGIN = "_smallvit_plugin"
Layer = TypeVar("Layer", bound=type[nn.Module])


def replacing_plugin(layer: nn.Module) -> str | None:
    """Return the name of the plugin that put a layer into the place of another."""
    return vars(layer).get(PLUGIN)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module, plugin: str) -> None:
    """Put a module into every place of another, and keep the other for `restore_original`."""
    object.__setattr__(new, ORIGINAL, old)
    object.__setattr__(new, PLUGIN, plugin)
    _swap(model, old, new)


def restore_original(model: nn.Module, layer: nn.Module) -> nn.Module:
    """Put the module that a layer replaced back, on the layer's device, in its dtype and mode, and return it."""
    old, parameters = original(layer), list(layer.parameters())
    like = next(iter(parameters), next(model.parameters(), None))
    old.to(like.device, like.dtype).train(layer.training)
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        old.requires_grad_(False)
    _swap(model, layer, old)
    return old


def _swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                setattr(parent, name, new)


def shared_constant(create: Callable[..., Tensor], like: Tensor, *arguments: Any) -> Tensor:
    """Return `create(*arguments, dtype, device)` with those of a tensor, from a cache outside of graphs.

    All layers and steps share the result; do not change it. The arguments must be hashable.
    """
    plain = type(like) in (Tensor, nn.Parameter)  # not fake, for example
    if not plain or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return create(*arguments, like.dtype, like.device)
    return _cached_constant(create, *arguments, like.dtype, like.device)


@lru_cache(maxsize=32)
def _cached_constant(create: Callable[..., Tensor], *arguments: Any) -> Tensor:
    with torch.inference_mode(False):  # for later use in training too
        return create(*arguments)


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Return whether calling a layer does nothing but the `forward` of `kind` with plain weights.

    Only then may its weights be used without calling it. A layer that is adapted, quantized, parametrized, pruned,
    offloaded, hooked or has its own `forward` must be called.
    """
    return (
        type(layer) is kind
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not _has_global_hooks()
        and not any(hasattr(weight, "__tensor_flatten__") for weight in layer._parameters.values())  # e.g. of torchao
    )


def _has_global_hooks() -> bool:
    """Return whether hooks are registered for all modules, other than those of torch's FLOP counter.

    The counter only follows which module is running, and should count what runs without it.
    """
    hooks = (
        modules._global_forward_hooks,
        modules._global_forward_pre_hooks,
        modules._global_backward_hooks,
        modules._global_backward_pre_hooks,
    )
    return any(not str(hook.__module__).startswith("torch.utils.") for each in hooks for hook in each.values())


def fx_leaf(cls: Layer) -> Layer:
    """Make torch.fx, and the feature extractors of timm and torchvision, record a layer as one node.

    Its `forward` depends on shapes and modes that a symbolic trace does not know.
    """
    forward: Callable[..., Any] = cls.forward

    @wraps(forward)
    def forward_or_node(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for value in chain(args, kwargs.values()):
            if isinstance(value, Proxy):
                return _node(self, value, args, kwargs)
        return forward(self, *args, **kwargs)

    cls.forward = forward_or_node
    return register_notrace_module(cls)


def _node(layer: nn.Module, proxy: Proxy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proxy:
    if proxy.tracer.root is layer:
        raise TypeError(f"torch.fx cannot trace a {type(layer).__name__} alone: trace the model that contains it")
    return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(layer), args, kwargs)


class Adapter:
    """Mixin that changes a layer in place by changing its class; the first base, before the layer's class.

    The layer keeps its identity, weights, buffers and hooks. Classes are plain ones, so that instances pickle.
    """

    adapters: ClassVar[dict[type[nn.Module], type[Any]]] = {}
    """Adapter by layer class, which defining one fills; each direct subclass of `Adapter` has its own table."""
    adapted: ClassVar[type[nn.Module]]
    """The layer class that this one adapts."""
    added: tuple[str, ...] = ()
    """Names of parameters, submodules and attributes that the adapted layer does not have."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        mixin, *rest = cls.__bases__
        if mixin is Adapter:
            cls.adapters = {}
        if rest and issubclass(mixin, Adapter):  # not what others derive from an adapter, such as FSDP
            cls.adapted = rest[0]
            cls.adapters[cls.adapted] = fx_leaf(cls)

    @property
    def before(self) -> type[nn.Module]:
        """The layer's class before it was patched."""
        return self.adapted

    def release(self) -> None:
        """Turn back into the previous class, in place; weights stay as they are now."""
        before = self.before
        for name in self.added:
            delattr(self, name)
        self.__class__ = before


class Derived:
    """Mixin of the classes that `derive` creates; the first base, before the layer's class."""

    added: ClassVar[tuple[str, ...]] = ()
    """Names of parameters and submodules that the layer did not have."""

    def release(self) -> None:
        """Turn back into the previous class, in place."""
        for name in self.added:
            delattr(self, name)
        self.__class__ = type(self).__bases__[1]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, type(self).__bases__, self.__dict__


@cache
def derive(mixin: type[Derived], kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a mixin and a layer class, which may be another plugin's. Its instances pickle."""
    return fx_leaf(type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {"__module__": mixin.__module__}))


def _new(mixin: type[Derived], kind: type[nn.Module]) -> nn.Module:
    cls = derive(mixin, kind)
    return cls.__new__(cls)
