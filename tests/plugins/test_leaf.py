"""Sublayers that are adapted, hooked, parametrized, pruned, quantized or offloaded are called, not read.

Every site that folds a sublayer's weights is compared with the plain equation, in which the sublayer is called.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Attention
from timm.models import cait, swin_transformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import smallvit
from smallvit.models.factory import create_model
from smallvit.models.lee2021 import ClassTalkingHeads, TalkingHeads
from smallvit.plugins import LSAConfig, SPTConfig
from smallvit.plugins.leaf import is_plain, shared_constant
from smallvit.plugins.lsa_layer import Locality
from smallvit.plugins.spt_layer import ShiftedConv2d, ShiftedPatchMerging, ShiftedPatchTokenization

from .naive import join, naive, split, swin_table
from .pixels import cut, shifts
from .sweep import each
from .zoo import build, images, shaken

# The places, and the equations written with calls of the sublayers


def tokenization(layer: ShiftedPatchTokenization, x: Tensor) -> Tensor:
    views = [(0, 0), *shifts(layer.patch_size)]
    patches = cut(x, layer.patch_size, views, layer.stride, layer.padding, layer.ceil_mode).flatten(3)
    return rearrange(layer.proj(layer.norm(patches)), "b i j e -> b e i j")


def merging(layer: ShiftedPatchMerging, x: Tensor) -> Tensor:
    return tokenization(layer, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def attention(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.proj(join(naive(layer, *split(layer.qkv(x), layer.num_heads))))


def windows(layer: nn.Module, x: Tensor) -> Tensor:
    bias = swin_table(layer.relative_position_bias_table, *layer.window_size)
    maps = naive(layer, *split(layer.qkv(x), layer.num_heads), bias, after=layer.attn_drop)
    return layer.proj(join(maps))


def mixed(mix: nn.Module, maps: Tensor) -> Tensor:
    return mix(maps.movedim(1, -1)).movedim(-1, 1)


def talking(layer: nn.Module, x: Tensor) -> Tensor:
    q, k, v = split(layer.qkv(x), layer.num_heads)
    after = lambda maps: layer.attn_drop(mixed(layer.proj_w, maps))  # noqa: E731
    return layer.proj(join(naive(layer, q, k, v, before=lambda scores: mixed(layer.proj_l, scores), after=after)))


def class_talking(layer: ClassTalkingHeads, x: Tensor) -> Tensor:
    parts = layer.q(x[:, :1]), layer.k(x[:, 1:]), layer.v(x[:, 1:])
    q, k, v = (split(part, layer.num_heads, 1)[0] for part in parts)
    scores = mixed(layer.proj_l, torch.einsum("bhid,bhjd->bhij", q, k) * layer.scale)
    maps = layer.attn_drop(mixed(layer.proj_w, scores.softmax(dim=-1)))
    return layer.proj(join(torch.einsum("bhij,bhjd->bhid", maps, v)))


def plain_talking(layer: TalkingHeads, x: Tensor) -> Tensor:
    q, k, v = split(layer.qkv(x), layer.num_heads)
    scores = mixed(layer.proj_l, torch.einsum("bhid,bhjd->bhij", q, k) * layer.scale)
    maps = layer.attn_drop(mixed(layer.proj_w, scores.softmax(dim=-1)))
    return layer.proj(join(torch.einsum("bhij,bhjd->bhid", maps, v)))


def local(layer: nn.Module) -> nn.Module:
    Locality.adapters[type(layer)].adopt(layer, LSAConfig(), gradual=False)
    return layer


Equation = Callable[[Any, Tensor], Tensor]
SITES: dict[str, tuple[Callable[[], nn.Module], Equation, tuple[int, ...], tuple[str, ...]]] = {
    "tokenization": (lambda: ShiftedPatchTokenization(3, 6, 4), tokenization, (2, 3, 8, 12), ("norm", "proj")),
    "tokenization, overlapping": (
        lambda: ShiftedPatchTokenization(2, 6, 3, stride=2, padding=1),
        tokenization,
        (2, 2, 9, 8),
        ("norm", "proj"),
    ),
    "tokenization, no norm": (
        lambda: ShiftedPatchTokenization(3, 6, 4, config=SPTConfig(norm=False)),
        tokenization,
        (2, 3, 8, 8),
        ("norm", "proj"),
    ),
    "merging": (lambda: ShiftedPatchMerging(4, 8), merging, (2, 5, 6, 4), ("norm", "proj")),
    "attention": (lambda: local(Attention(12, 3, qkv_bias=True)), attention, (2, 5, 12), ("qkv", "proj")),
    "windows": (
        lambda: local(swin_transformer.WindowAttention(12, 3, window_size=(2, 3))),
        windows,
        (4, 6, 12),
        ("qkv", "proj", "attn_drop"),
    ),
    "talking heads": (
        lambda: local(cait.TalkingHeadAttn(12, 3, qkv_bias=True)),
        talking,
        (2, 5, 12),
        ("qkv", "proj_l", "proj_w", "attn_drop"),
    ),
    "the paper's talking heads": (
        lambda: local(TalkingHeads(12, 3, head_dim=8)),
        talking,
        (2, 5, 12),
        ("qkv", "proj_l", "proj_w", "attn_drop"),
    ),
    "the paper's talking heads, plain": (
        lambda: TalkingHeads(12, 3, head_dim=8),
        plain_talking,
        (2, 5, 12),
        ("qkv", "proj_l", "proj_w", "attn_drop"),
    ),
    "the paper's class attention": (
        lambda: ClassTalkingHeads(12, 3, head_dim=8),
        class_talking,
        (2, 5, 12),
        ("q", "proj_l", "proj_w", "attn_drop"),
    ),
}
"""How the layer is made, its equation, the shape of its input, and the sublayers that must be called."""

# What is done to a sublayer


class LowRank(nn.Module):
    """LoRA of a linear layer, which shows the weights of the layer within, as libraries of adapters do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Scaled(nn.Module):
    """A learned gain around any layer, or of any weight."""

    def __init__(self, base: nn.Module | None = None) -> None:
        super().__init__()
        self.base, self.gain = base or nn.Identity(), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.gain


class Rounded(Tensor):
    """Quantized weights in place of a layer's own, as torchao has them: only `F.linear` can use them."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.linear:
            return F.linear(args[0], args[1].as_subclass(Tensor), *args[2:])
        if function in (Tensor.mul, Tensor.__mul__, torch.mul, torch.cat, Tensor.expand, Tensor.to):
            raise NotImplementedError(f"{function} of quantized weights")
        return super().__torch_function__(function, types, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data"], None


def adapt(parent: nn.Module, name: str) -> None:
    layer = parent.get_submodule(name)
    setattr(parent, name, LowRank(layer) if isinstance(layer, nn.Linear) else Scaled(layer))


def parametrize_weight(parent: nn.Module, name: str) -> None:
    parametrize.register_parametrization(parent.get_submodule(name), "weight", Scaled())


def prune_weight(parent: nn.Module, name: str) -> None:
    prune.l1_unstructured(parent.get_submodule(name), "weight", amount=0.5)


def hook_forward(parent: nn.Module, name: str) -> None:
    parent.get_submodule(name).register_forward_hook(lambda _, inputs, output: output * 1.5)


def hook_input(parent: nn.Module, name: str) -> None:
    parent.get_submodule(name).register_forward_pre_hook(lambda _, inputs: (inputs[0].sin(),))


def replace_forward(parent: nn.Module, name: str) -> None:
    layer = parent.get_submodule(name)
    layer.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 1.5, layer)


def replace_weight(parent: nn.Module, name: str) -> None:
    weight = parent.get_submodule(name).weight
    del parent.get_submodule(name).weight
    rounded = (weight.detach() * 8).round().div(8).as_subclass(Rounded)
    parent.get_submodule(name).register_parameter("weight", nn.Parameter(rounded, requires_grad=False))


def offload(parent: nn.Module, name: str) -> None:
    """Keep the weights elsewhere, to be loaded by a `forward` of the instance's, as accelerate does."""
    layer = parent.get_submodule(name)
    plain, kept = copy.deepcopy(layer), {key: weight.detach() for key, weight in layer.named_parameters()}
    layer.to("meta")
    layer.forward = lambda x: functional_call(plain, kept, (x,))


def without_biases(parent: nn.Module, name: str) -> None:
    layer = parent.get_submodule(name)
    layer.bias = None


WEIGHTS = {"parametrize": parametrize_weight, "prune": prune_weight, "quantized weights": replace_weight}
CHANGES: dict[str, Callable[[nn.Module, str], None]] = WEIGHTS | {
    "adapter": adapt,
    "forward hook": hook_forward,
    "forward-pre hook": hook_input,
    "own forward": replace_forward,
    "offload": offload,
    "no bias": without_biases,
}


def made(site: str) -> tuple[nn.Module, Equation, Tensor, tuple[str, ...]]:
    make, equation, shape, names = SITES[site]
    torch.manual_seed(0)
    return shaken(make()), equation, torch.randn(shape), names


def fits(change: str, layer: nn.Module) -> bool:
    if isinstance(layer, nn.LayerNorm):
        return change != "quantized weights"
    return isinstance(layer, nn.Linear) or change not in (*WEIGHTS, "no bias")


def assert_equals_the_equation(layer: nn.Module, equation: Equation, x: Tensor, label: str) -> None:
    """Compare outputs and the gradients of the input and of everything that learns."""
    weights = (weight for weight in layer.parameters() if weight.requires_grad and not weight.is_meta)
    inputs = [x.requires_grad_(), *weights]
    ours, theirs = layer(x), equation(layer, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text: f"{label}: {text}")
    upstream = torch.randn_like(ours)
    actual, expected = (
        torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, materialize_grads=True)
        for outputs in (ours, theirs)
    )
    for mine, other in zip(actual, expected, strict=True):
        size = other.abs().max().item()
        torch.testing.assert_close(
            mine, other, rtol=1e-3, atol=1e-4 * size + 1e-6, msg=lambda text: f"{label}, gradient: {text}"
        )


@each(SITES, "site")
def test_a_changed_sublayer_counts_as_in_the_equation(site: str) -> None:
    *_, names = made(site)
    for name in names:
        for change, act in CHANGES.items():
            layer, equation, x, _ = made(site)
            if not fits(change, layer.get_submodule(name)):
                continue
            before = layer(x)
            act(layer, name)
            if change not in ("offload", "no bias"):
                assert not torch.allclose(layer(x), before, rtol=1e-4), f"{name}: {change} has no effect"
            assert_equals_the_equation(layer.train(), equation, x, f"{name}, {change}")


@each(SITES, "site")
def test_dynamically_quantized_sublayers_count_as_in_the_equation(site: str) -> None:
    if not {"x86", "fbgemm", "qnnpack"} & set(torch.backends.quantized.supported_engines):
        pytest.skip("this build of torch has no quantized kernels")
    quantization = pytest.importorskip("torch.ao.quantization")
    layer, equation, x, _ = made(site)
    quantized = quantization.quantize_dynamic(layer.eval(), {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(quantized(x), equation(quantized, x), rtol=0.05, atol=0.05)


@contextmanager
def watched(register: Callable[[Callable[..., None]], Any]) -> Iterator[list[nn.Module]]:
    """Note the modules for which a hook is called."""
    seen: list[nn.Module] = []
    handle = register(lambda module, *_: seen.append(module))
    try:
        yield seen
    finally:
        handle.remove()


@each(SITES, "site")
def test_every_kind_of_hook_fires(site: str) -> None:
    layer, equation, x, names = made(site)
    for name in names:
        sublayer = layer.get_submodule(name)
        for register in (
            sublayer.register_forward_hook,
            sublayer.register_forward_pre_hook,
            sublayer.register_full_backward_hook,
            sublayer.register_full_backward_pre_hook,
            modules.register_module_forward_hook,
            modules.register_module_forward_pre_hook,
            modules.register_module_full_backward_hook,
            modules.register_module_full_backward_pre_hook,
        ):
            with watched(register) as seen:
                y = layer(x.requires_grad_())
                y.square().sum().backward()
                assert sublayer in seen, f"{name}: {register.__name__}"
                torch.testing.assert_close(y, equation(layer, x), rtol=1e-4, atol=1e-5)
        assert is_plain(sublayer, type(sublayer))


def test_an_adapter_around_a_convolution_with_shifted_views_trains_and_merges() -> None:
    """Make the adapter's own convolutions of the same class, as PEFT does."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 4, 4)
    ShiftedConv2d.adopt(layer, SPTConfig())
    shaken(layer)
    x = torch.randn(2, 3, 8, 8)
    down = type(layer)(3, 2, layer.kernel_size, layer.stride, layer.padding, bias=False)
    up = nn.Conv2d(2, 8, 1, bias=False)
    adapted = layer(x) + up(down(x))
    adapted.square().sum().backward()
    assert down.weight.grad.any()
    delta = torch.einsum("erab,rcpq->ecpq", up.weight, down.weight)
    merged = copy.deepcopy(layer)
    merged.weight.data += delta
    torch.testing.assert_close(merged(x), adapted, rtol=1e-4, atol=1e-5)


def test_a_changed_convolution_with_shifted_views_counts_as_in_the_equation() -> None:
    for change, act in CHANGES.items():
        if change in ("adapter", "quantized weights", "offload", "own forward", "no bias"):
            continue  # done to the whole layer
        torch.manual_seed(0)
        parent = nn.Sequential(nn.Conv2d(3, 8, 4, 4))
        ShiftedConv2d.adopt(parent[0], SPTConfig())
        shaken(parent)
        act(parent, "0")
        layer, x = parent[0], torch.randn(2, 3, 8, 12)
        actual = parent(x)  # pruning computes the weight in a hook
        around = x.sin() if change == "forward-pre hook" else x
        patches = cut(around, layer.kernel_size, [(0, 0), *shifts(layer.kernel_size)])
        kernels = torch.cat([layer.weight[:, None], rearrange(layer.shifted, "e (v c) p q -> e v c p q", c=3)], dim=1)
        expected = torch.einsum("bijvcpq,evcpq->beij", patches, kernels) + layer.bias[:, None, None]
        expected = expected * 1.5 if change == "forward hook" else expected
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{change}: {text}")  # noqa: B023


@each(["paper", "preserve"], "init")
@each(["vit", "cait", "pit", "swin"], "name")
def test_offloaded_models_keep_their_logits(name: str, init: str) -> None:
    model = smallvit.patch(build(name), spt=True, lsa=True, init=init)
    expected = model(images(name))
    for path, layer in list(model.named_modules()):
        if type(layer) in (nn.Linear, nn.LayerNorm):
            offload(model, path)
    torch.testing.assert_close(model(images(name)), expected, rtol=1e-4, atol=1e-5)


@each(["vit", "cait", "pit", "swin", "t2t"], "arch")
def test_lora_by_peft_trains_and_merges(arch: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = create_model(arch, img_size=32, num_classes=5, plugins={"spt": True, "lsa": True})
    config = peft.LoraConfig(
        r=2, target_modules="all-linear", modules_to_save=["head", "head.fc"], init_lora_weights=False
    )
    adapted, x = peft.get_peft_model(model, config), torch.randn(2, 3, 32, 32)
    adapted.train()(x).sum().backward()
    assert not [name for name, weight in adapted.named_parameters() if "lora_" in name and weight.grad is None]
    expected = adapted.eval()(x)
    torch.testing.assert_close(adapted.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)


def test_the_flop_counter_counts_what_runs_without_it() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3)
    smallvit.patch(model, spt=True, lsa=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.patch_embed.proj(torch.randn(1, 3, 16, 16))
    (y, z), sites = model.patch_embed.proj.views.window, 16 * 24
    assert counter.get_total_flops() == 2 * sites * 3 * y * z


def ramp(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(n, dtype=dtype, device=device)


def test_constants_are_shared_but_not_with_fake_tensors_compiled_graphs_or_function_transforms() -> None:
    like = torch.randn(2)
    with torch.inference_mode():
        first = shared_constant(ramp, like, 5)
    assert shared_constant(ramp, nn.Parameter(like), 5) is first
    assert shared_constant(ramp, like.double(), 5).dtype == torch.float64
    assert shared_constant(ramp, like, 6).shape == (6,)
    (first * like.requires_grad_()[0]).sum().backward()  # not an inference tensor
    with FakeTensorMode() as fake:
        assert shared_constant(ramp, fake.from_tensor(torch.randn(2)), 7).shape == (7,)
    assert not isinstance(shared_constant(ramp, like, 7), FakeTensor)
    compiled = torch.compile(lambda x: x + shared_constant(ramp, x, 2), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.tensor([1.0, 2.0]))
    slopes = torch.func.grad(lambda x: (x * shared_constant(ramp, x, 3)).sum())(torch.zeros(3))
    assert torch.equal(slopes, torch.tensor([0.0, 1.0, 2.0]))
    rows = torch.func.vmap(lambda x: x + shared_constant(ramp, x, 4))(torch.zeros(2, 4))
    assert torch.equal(rows, shared_constant(ramp, like, 4).expand(2, 4))
    assert torch.equal(shared_constant(ramp, like, 3), torch.arange(3.0))
