"""Test attention maps against softmax(q kᵀ t + bias) written out from the weights of each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import cait, swin_transformer, swin_transformer_v2
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel
from torch.overrides import _get_current_function_mode_stack

import smallvit
from smallvit.attention.maps import AttentionMap, extract_attention
from smallvit.attention.rollout import relevance
from smallvit.models.factory import create_model
from smallvit.models.lee2021 import ClassTalkingHeads
from smallvit.models.t2t import TokenAttention
from smallvit.plugins.lsa_layer import Locality
from smallvit.utils.errors import InputError

from ..plugins.naive import linear, offsets, probabilities, split, swin_table, temperature
from ..plugins.zoo import VIT, ZOO, build, shaken
from ..plugins.zoo import images as zoo_images

SMALL = {"img_size": 16, "patch_size": 4, "num_classes": 5}


def ours(arch: str, **sizes: int) -> Callable[[], nn.Module]:
    return lambda: shaken(create_model(arch, **SMALL | sizes)).eval()


def oblong() -> nn.Module:
    return shaken(timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT | {"img_size": (16, 24)})).eval()


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], list[tuple[int, int, tuple[int, int]]]]] = {
    "vit": (ours("vit"), (16, 16), [(1, 1, (4, 4))]),
    "vit, oblong": (oblong, (16, 24), [(1, 1, (4, 6))]),
    "vit registers": (lambda: build("vit registers"), (16, 16), [(3, 3, (4, 4))]),
    "vit average pool": (lambda: build("vit average pool"), (16, 16), [(0, 0, (4, 4))]),
    "deit distilled": (lambda: build("deit distilled"), (16, 16), [(2, 2, (4, 4))]),
    "cait": (ours("cait"), (16, 16), [(0, 0, (4, 4)), (0, 1, (4, 4))]),
    "cait of timm": (lambda: build("cait"), (16, 16), [(0, 0, (4, 4)), (1, 1, (4, 4))]),
    "pit": (ours("pit", patch_size=2), (16, 16), [(1, 1, (8, 8)), (1, 1, (4, 4)), (1, 1, (2, 2))]),
    "pit distilled": (
        lambda: build("pit distilled"),
        (16, 16),
        [(2, 2, (8, 8)), (2, 2, (4, 4)), (2, 2, (2, 2))],
    ),
    "swin": (ours("swin", patch_size=1), (16, 16), [(0, 0, (16, 16)), (0, 0, (8, 8)), (0, 0, (4, 4))]),
    "swin, padded": (lambda: build("swin odd"), (20, 20), [(0, 0, (5, 5)), (0, 0, (3, 3))]),
    "swin v2": (lambda: build("swin v2"), (32, 32), [(0, 0, (16, 16)), (0, 0, (8, 8))]),
    "t2t": (ours("t2t"), (16, 16), [(0, 0, (8, 8)), (1, 1, (4, 4))]),
}
"""Model, image size, and (prefix, query prefix, grid) of its layers without repetitions."""
PLAIN_AND_PATCHED = list(product(FAMILIES, (False, True)))


def check_each(items: Iterable[Any], check: Callable[..., None]) -> None:
    """Check all items, and fail with one list of those that do not pass."""
    failures = []
    for item in items:
        try:
            check(*item) if isinstance(item, tuple) else check(item)
        except AssertionError as error:
            failures.append(f"{item}: {error}")
    assert not failures, "\n".join(failures)


def build_family(name: str, patched: bool = False) -> tuple[nn.Module, Tensor]:
    """Build a model and random images."""
    torch.manual_seed(0)
    make, sides, _ = FAMILIES[name]
    model = make()
    if patched:
        smallvit.patch(model, spt=True, lsa=True)
        shaken(model)
    return model.eval(), torch.randn(2, 3, *sides)


def layer_inputs(model: nn.Module, images: Tensor, names: list[str]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return the tokens and the mask of shifted windows that attention layers receive."""
    inputs_by_layer = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple, more: dict) -> None:
            inputs_by_layer[name] = inputs[0], more.get("mask")

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in names]
    model(images)
    for hook in hooks:
        hook.remove()
    return inputs_by_layer


def reference_map(layer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax(M(q kᵀ t + bias)) of a layer's weights."""
    hidden = getattr(layer, "masked", False)
    if isinstance(layer, cait.ClassAttn):
        keys = x[:, 1:] if isinstance(layer, ClassTalkingHeads) else x
        (q,), (k,) = (split(linear(*pair), layer.num_heads, 1) for pair in ((x[:, :1], layer.q), (keys, layer.k)))
    elif isinstance(layer, swin_transformer_v2.WindowAttention):
        bias = torch.cat([layer.q_bias, 0 * layer.q_bias, layer.v_bias])
        q, k, _ = split(x @ layer.qkv.weight.T + bias, layer.num_heads)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    else:
        q, k, _ = split(linear(x, layer.qkv), layer.num_heads)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * score_scale(layer, q.shape[-1]) + position_bias(layer)
    if hasattr(layer, "proj_l"):
        scores = torch.einsum("bhij,gh->bgij", scores, layer.proj_l.weight)
        scores = scores if layer.proj_l.bias is None else scores + layer.proj_l.bias[:, None, None]
    alone = None
    if mask is not None:
        mask = mask.repeat(len(x) // len(mask), 1, 1)[:, None]
        scores = scores + mask
        alone = ((mask < 0) | torch.eye(mask.shape[-1], dtype=torch.bool)).all(dim=-1)
    return probabilities(scores, hidden, alone)


def score_scale(layer: nn.Module, width: int) -> Tensor | float:
    """Return the factor of the scores."""
    if isinstance(layer, swin_transformer_v2.WindowAttention):
        return layer.logit_scale.clamp(max=math.log(100)).exp()
    if isinstance(layer, Locality):
        return temperature(layer)
    return (layer.qkv.in_features if isinstance(layer, TokenAttention) else width) ** -0.5


def position_bias(layer: nn.Module) -> Tensor | float:
    """Return the relative position bias."""
    if isinstance(layer, swin_transformer.WindowAttention):
        return swin_table(layer.relative_position_bias_table, *layer.window_size)
    if isinstance(layer, swin_transformer_v2.WindowAttention):
        height, width = layer.window_size
        coordinates = 8 * offsets(height, width) / torch.tensor([height - 1, width - 1])
        coordinates = coordinates.sign() * (coordinates.abs() + 1).log2() / 3
        return 16 * layer.cpb_mlp(coordinates).permute(2, 0, 1).sigmoid()
    return 0.0


@torch.inference_mode()
def test_maps_match_softmax_of_weights_and_logits_are_bit_equal_to_forward() -> None:
    def check(name: str, patched: bool) -> None:
        model, images = build_family(name, patched)
        logits = model(images)
        extracted, maps = extract_attention(model, images)
        assert torch.equal(extracted, logits)
        assert torch.equal(model(images), logits)
        layers = [path for path, module in model.named_modules() if hasattr(module, "attn_drop")]
        assert [each.layer for each in maps] == layers
        inputs = layer_inputs(model, images, layers)
        for each in maps:
            layer = model.get_submodule(each.layer)
            expected = reference_map(layer, *inputs[each.layer])
            weights = each.weights if each.window is None else each.weights.flatten(0, 1)
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
            if patched and layer.masked and weights.shape[-1] > 1 and inputs[each.layer][1] is None:
                assert weights.diagonal(dim1=-2, dim2=-1).abs().max() == 0

    check_each(PLAIN_AND_PATCHED, check)


@torch.inference_mode()
def test_layouts_of_families() -> None:
    def check(name: str) -> None:
        model, images = build_family(name)
        _, maps = extract_attention(model, images)
        layouts = [(each.prefix, each.query_prefix, each.grid) for each in maps]
        changes = [layout for index, layout in enumerate(layouts) if not index or layout != layouts[index - 1]]
        assert changes == FAMILIES[name][2]
        for each in maps:
            torch.testing.assert_close(each.full().sum(-1), torch.ones(each.full().shape[:-1]))
            assert each.image().shape == (2, each.weights.shape[-3], *each.grid)

    check_each(FAMILIES, check)


LayoutTuple = tuple[int, int, tuple[int, int], tuple[int, int] | None]
POOLED_KEYS: dict[str, tuple[tuple[int, int], dict[str, bool], list[LayoutTuple]]] = {
    "8 pixels": ((8, 8), {}, [(0, 0, (4, 4), (8, 8)), *((0, 0, (side, side), None) for side in (4, 2, 1))]),
    "oblong": (
        (16, 24),
        {},
        [(0, 0, (4, 6), (16, 24)), (0, 0, (4, 6), (8, 12)), (0, 0, (4, 6), None), (0, 0, (2, 3), None)],
    ),
    "class token": (
        (8, 8),
        {"avg_pool_head": False},
        [(0, 0, (4, 4), (8, 8)), (0, 0, (4, 4), None), (0, 0, (2, 2), None), (1, 1, (1, 1), None)],
    ),
    "class token, oblong": (
        (16, 24),
        {"avg_pool_head": False},
        [(0, 0, (4, 6), (16, 24)), (0, 0, (4, 6), (8, 12)), (0, 0, (4, 6), None), (1, 1, (2, 3), None)],
    ),
    "no pyramid": ((16, 16), {"pyramid": False}, [(0, 0, (4, 4), None)]),
    "no pyramid, class token": ((16, 16), {"pyramid": False, "avg_pool_head": False}, [(1, 1, (4, 4), None)]),
}
"""BinaryViT with patches of one pixel: image size, options, and (prefix, query prefix, grid, query grid) of layers."""


def build_pooled_keys(name: str, binary: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    sides, options, _ = POOLED_KEYS[name]
    model = create_model("binaryvit_tiny", **SMALL | {"img_size": min(sides), "patch_size": 1}, **options)
    if not binary:
        smallvit.unpatch(model)
    model.set_input_size(sides)
    return shaken(model).eval(), torch.randn(2, 3, *sides)


@pytest.mark.slow
@torch.inference_mode()
def test_layouts_of_pooled_keys() -> None:
    def check(name: str, binary: bool) -> None:
        model, images = build_pooled_keys(name, binary)
        expected = model(images)
        logits, maps = extract_attention(model, images)
        assert torch.equal(logits, expected)
        layouts = [(each.prefix, each.query_prefix, each.grid, each.query_grid) for each in maps]
        changes = [layout for index, layout in enumerate(layouts) if not index or layout != layouts[index - 1]]
        assert changes == POOLED_KEYS[name][2]
        for each in maps:
            queries = each.query_prefix + math.prod(each.query_grid or each.grid)
            assert each.weights.shape[-2:] == (queries, each.prefix + math.prod(each.grid))
            torch.testing.assert_close(each.full().sum(-1), torch.ones(each.full().shape[:-1]))
            assert each.image().shape == (2, each.weights.shape[1], *each.grid)
            assert each.readout == ((0,) if each.prefix else None)

    check_each(product(POOLED_KEYS, (False, True)), check)


@pytest.mark.parametrize("binary", [False, True], ids=["full precision", "binary"])
@torch.inference_mode()
def test_maps_of_binary_attention_are_softmax_before_binarization(binary: bool) -> None:
    model, images = build_pooled_keys("8 pixels", binary)
    layer, projected = model.stages[0].blocks[1].attn, []
    for part in (layer.q, layer.k):
        part.register_forward_hook(lambda _, inputs, output: projected.append(output[0]))  # one head
    _, maps = extract_attention(model, images)
    each = next(each for each in maps if each.layer == "stages.0.blocks.1.attn")
    q, k = projected
    if binary:
        q, k = (
            torch.where(part + move >= 0, 1.0, -1.0)
            for part, move in zip(projected, layer.moves.view(3, -1), strict=False)
        )
    expected = probabilities(q @ k.mT * q.shape[-1] ** -0.5, hidden=False)
    assert expected.shape == (64, 16)
    torch.testing.assert_close(each.weights[0, 0], expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_fused_and_explicit_attention_match() -> None:
    def check(name: str, patched: bool) -> None:
        model, images = build_family(name, patched)
        maps = []
        for fused in (True, False):
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = fused
            maps.append(extract_attention(model, images)[1])
        for one, other in zip(*maps, strict=True):
            torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=1e-4)  # rounding, over many layers

    check_each(product(["vit", "cait of timm", "pit", "swin, padded", "t2t"], (False, True)), check)


OTHER_FAMILIES = ("beit", "eva", "eva-02", "vit relpos", "vit differential", "convit", "caformer", "crossvit")


@torch.inference_mode()
def test_other_timm_families_have_maps() -> None:
    def check(name: str) -> None:
        model, images = build(name), zoo_images(name)
        logits, maps = extract_attention(model, images)
        assert torch.equal(logits, model(images))
        assert len({each.layer for each in maps}) == len(maps)
        for each in maps:
            torch.testing.assert_close(each.weights.sum(-1), torch.ones(each.weights.shape[:-1]))
            assert each.prefix + math.prod(each.grid) == each.weights.shape[-1]
            assert each.grid[0] == each.grid[1]

    check_each([*OTHER_FAMILIES, "vit attention pool"], check)


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_model_has_unchanged_outputs_and_maps() -> None:
    model, images = build_family("vit registers", patched=True)
    _, plain = extract_attention(model, images)

    def off_by_one(graph: nn.Module, _: list[Tensor]) -> Callable[..., tuple]:
        return lambda *inputs: tuple(output + 1 for output in graph(*inputs))

    compiled = torch.compile(model, backend=off_by_one)
    expected = compiled(images)
    assert not torch.equal(expected, model(images))
    logits, maps = extract_attention(compiled, images)
    assert torch.equal(logits, expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(images), expected)
    for one, other in zip(maps, plain, strict=True):
        assert one.layer == other.layer
        assert torch.equal(one.weights, other.weights)


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_blocks_have_maps() -> None:
    model, images = build_family("vit average pool")
    _, plain = extract_attention(model, images)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    _, maps = extract_attention(model, images)
    assert [each.layer for each in maps] == [each.layer for each in plain] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(torch.equal(one.weights, other.weights) for one, other in zip(maps, plain, strict=True))


@pytest.mark.slow
@torch.inference_mode()
def test_mixed_precision_maps_are_fp32_and_close_to_full_precision() -> None:
    def check(name: str, patched: bool) -> None:
        model, images = build_family(name, patched)
        _, full = extract_attention(model, images)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(images)
            logits, maps = extract_attention(model, images)
        assert torch.equal(logits, expected)
        for one, other in zip(maps, full, strict=True):
            assert one.weights.dtype == torch.float32
            assert (one.weights - other.weights).abs().mean() < 0.01
            torch.testing.assert_close(one.weights.sum(-1), torch.ones(one.weights.shape[:-1]), rtol=0, atol=0.02)

    check_each(product(["vit", "cait of timm", "swin", "t2t"], (False, True)), check)


def test_gradients_of_logits_are_unchanged() -> None:
    model, images = build_family("swin", patched=True)
    expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    logits, maps = extract_attention(model, images)
    gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))
    assert not any(each.weights.requires_grad for each in maps)


def average_pooled(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return shaken(timm.create_model("vit_tiny_patch16_224", num_classes=5, global_pool="avg", **VIT, **more)).eval()


READOUTS = {
    **{name: lambda name=name: build(name) for name in ("vit", "vit registers", "vit average pool", "deit distilled")},
    **{name: lambda name=name: build(name) for name in ("beit", "eva-02", "dinov3", "rope mixed", "pit distilled")},
    "class token and average pool": average_pooled,
    "registers and average pool": lambda: average_pooled(class_token=False, reg_tokens=2),
    "convit": lambda: build("convit"),
    "t2t": ours("t2t"),
}


def test_logits_have_gradients_in_the_readout_tokens_only() -> None:
    def check(name: str) -> None:
        model = READOUTS[name]()
        images = zoo_images(name) if name == "convit" else torch.randn(2, 3, 16, 16)
        each = extract_attention(model, images)[1][-1]
        outputs = []
        block = model.get_submodule(each.layer.rpartition(".")[0])
        block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
        logits = model(images)
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), outputs)
        readout = gradient.abs().amax(dim=(0, 2)).nonzero().flatten().tolist()
        assert readout == list(range(each.prefix, each.weights.shape[-2]) if each.readout is None else each.readout)

    check_each(READOUTS, check)


# Wrapped models


class Flipped(nn.Module):
    """Run a model on images and their mirror images in one batch, and average."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(torch.cat([x, x.flip(-1)])).unflatten(0, (2, -1)).mean(dim=0)


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DataParallel(model)


def normalizing(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3, eps=0).eval(), model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": data_parallel,
    "AveragedModel": AveragedModel,
    "Sequential": normalizing,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled within": lambda model: normalizing(torch.compile(model, backend="eager")),
    "DataParallel, compiled": lambda model: data_parallel(torch.compile(model, backend="eager")),
    "Sequential of AveragedModel": lambda model: normalizing(AveragedModel(model)),
    "test-time augmentation": Flipped,
}
WRAPPED = ["vit registers", "deit distilled", "cait", "pit distilled", "swin", "t2t", "beit", "dinov3"]


@torch.no_grad()
def check_wrapped(name: str, wrappers: Iterable[str]) -> None:
    model, images = (build(name), zoo_images(name)) if name in ZOO else build_family(name)
    _, plain = extract_attention(model, images)
    for label in wrappers:
        wrapped = WRAPPERS[label](model)
        logits, maps = extract_attention(wrapped, images)
        torch.testing.assert_close(logits, wrapped(images))
        for one, other in zip(maps, plain, strict=True):
            assert one.layer.endswith(other.layer), label
            assert vars(replace(one, layer="", weights=images)) == vars(replace(other, layer="", weights=images)), label
            torch.testing.assert_close(one.weights[:2], other.weights)
            assert len(one.weights) == (4 if label == "test-time augmentation" else 2)
            torch.testing.assert_close(one.image()[:2], other.image())


def test_wrapped_models_have_the_maps_of_the_model_within() -> None:
    wrappers = [label for label in WRAPPERS if "compiled" not in label]
    check_each(WRAPPED, lambda name: check_wrapped(name, wrappers))


@pytest.mark.slow
def test_compiled_wrapped_models_have_the_maps_of_the_model_within() -> None:
    check_wrapped("vit registers", [label for label in WRAPPERS if "compiled" in label])


def test_distributed_model_has_the_maps_of_the_model_within(tmp_path: Path) -> None:
    model, images = build("vit registers"), zoo_images("vit registers")
    _, plain = extract_attention(model, images)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        _, maps = extract_attention(wrapped, images)
        for _ in range(2):  # relevance leaves no reduction unfinished
            relevance(wrapped, images)
            wrapped(images).sum().backward()
    finally:
        distributed.destroy_process_group()
    for one, other in zip(maps, plain, strict=True):
        assert (one.prefix, one.grid, one.readout) == (3, (4, 4), (0,))
        torch.testing.assert_close(one.weights, other.weights)


@pytest.mark.parametrize("name", ["vit registers", "deit distilled", "pit distilled", "beit"])
def test_features_only_models_have_the_maps_of_the_whole_model(name: str) -> None:
    _, plain = extract_attention(build(name), zoo_images(name))
    arguments = {
        "vit registers": ("vit_tiny_patch16_224", VIT | {"reg_tokens": 2}),
        "deit distilled": ("deit_tiny_distilled_patch16_224", VIT),
        "pit distilled": (
            "pit_ti_distilled_224",
            {"img_size": 16, "patch_size": 2, "stride": 2, "base_dims": (8,) * 3, "depth": (1,) * 3},
        ),
        "beit": ("beit_base_patch16_224", VIT),
    }
    architecture, sizes = arguments[name]
    model = timm.create_model(architecture, features_only=True, out_indices=(0, 1), **sizes).eval()
    _, maps = extract_attention(model, zoo_images(name))
    for one, other in zip(maps, plain, strict=False):
        assert (one.prefix, one.query_prefix, one.grid) == (other.prefix, other.query_prefix, other.grid)
    with pytest.raises(InputError, match="does not return logits"):
        relevance(model, zoo_images(name))


# Grids


def test_grid_follows_the_patch_embedding() -> None:
    for patch, grid in (((4, 8), (4, 2)), ((8, 4), (2, 4)), ((2, 8), (8, 2))):
        model = timm.create_model("vit_tiny_patch16_224", **VIT | {"patch_size": patch}).eval()
        assert {each.grid for each in extract_attention(model, torch.randn(1, 3, 16, 16))[1]} == {grid}


class Merged(nn.Module):
    """Merge the last `count` tokens after a block."""

    def __init__(self, block: nn.Module, count: int) -> None:
        super().__init__()
        self.block, self.count = block, count

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        x = self.block(x, **more)
        rest, merged = x[:, : x.shape[1] - self.count], x[:, x.shape[1] - self.count :]
        return torch.cat([rest[:, :-1], (rest[:, -1:] + merged.sum(dim=1, keepdim=True))], dim=1)


def test_dropped_and_merged_tokens_are_errors() -> None:
    images, models = torch.randn(2, 3, 16, 16), {}
    for rate in (0.25, 0.5, 0.75):
        for architecture, sizes in (("vit_tiny_patch16_224", VIT), ("eva02_tiny_patch14_224", VIT | {"embed_dim": 48})):
            model = timm.create_model(architecture, patch_drop_rate=rate, **sizes)
            assert extract_attention(model.eval(), images)[1][0].grid == (4, 4)
            models[f"{architecture}, {rate} dropped"] = model.train()
    for count in (1, 4, 7, 8, 12):  # of 16
        for name in ("vit", "vit average pool", "deit distilled"):
            model = build(name)
            model.blocks[0] = Merged(model.blocks[0], count)
            models[f"{name}, {count} merged"] = model
    for label, model in models.items():
        for function in (extract_attention, relevance):
            with pytest.raises(InputError, match=r"blocks\.\d\S+ of \w+: its .* dropping .* or merging") as error:
                function(model, images)
            assert "\n" not in str(error.value), label


# Windows


def same_window(each: AttentionMap, one: int, other: int) -> tuple[int, int, int] | None:
    """Return the window that two image tokens share and their indices in it, or None."""
    positions = []
    for token in (one, other):
        row, column = (
            (index - step) % side
            for index, step, side in zip(divmod(token, each.grid[1]), each.shift, each.grid, strict=True)
        )
        across = -(-each.grid[1] // each.window[1])
        window = row // each.window[0] * across + column // each.window[1]
        positions.append((window, row % each.window[0] * each.window[1] + column % each.window[1]))
    (first, query), (second, key) = positions
    return (first, query, key) if first == second else None


def merge_windows(each: AttentionMap) -> Tensor:
    """Merge the windows' weights into one matrix, token by token."""
    n = math.prod(each.grid)
    full = torch.zeros(each.weights.shape[0], each.weights.shape[2], n, n)
    for query, key in product(range(n), repeat=2):
        if (shared := same_window(each, query, key)) is not None:
            window, i, j = shared
            full[:, :, query, key] = each.weights[:, window, :, i, j]
    return full


@pytest.mark.parametrize(
    ("name", "layer", "padded"),
    [
        ("swin", "layers.1.blocks.1.attn", False),
        ("swin, padded", "layers.0.blocks.0.attn", True),
        ("swin, padded", "layers.0.blocks.1.attn", False),  # its mask hides the padding
    ],
)
@torch.inference_mode()
def test_windows_are_merged_without_padding(name: str, layer: str, padded: bool) -> None:
    model, images = build_family(name)
    _, maps = extract_attention(model, images)
    each = next(each for each in maps if each.layer == layer)
    expected = merge_windows(each)
    assert (expected == 0).float().mean() > 0.5
    assert (expected.sum(dim=-1) < 0.999).any() == padded
    expected = expected / expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(each.full(), expected)
    torch.testing.assert_close(each.image(), expected.mean(dim=2).unflatten(-1, each.grid))
    entropy = -(expected * expected.clamp(min=1e-38).log()).sum(dim=-1).mean(dim=-1)
    torch.testing.assert_close(each.entropy(), entropy)
    y, x = torch.meshgrid(*(torch.arange(side) * 16.0 / side for side in each.grid), indexing="ij")
    distances = torch.hypot(y.flatten()[:, None] - y.flatten(), x.flatten()[:, None] - x.flatten())
    torch.testing.assert_close(each.distance(16), (expected * distances).sum(dim=-1).mean(dim=-1))


@torch.inference_mode()
def test_full_matrix_of_shifted_windows_reproduces_the_block() -> None:
    model, images = build_family("swin")
    _, maps = extract_attention(model, images)
    block = model.layers[1].blocks[1]
    full = next(each for each in maps if each.layer == "layers.1.blocks.1.attn").full()
    tokens, _ = layer_inputs(model, images, ["layers.1.blocks.1"])["layers.1.blocks.1"]
    normed = block.norm1(tokens)
    v = split(linear(normed.flatten(1, 2), block.attn.qkv), block.attn.num_heads)[2]
    y = linear((full @ v).transpose(1, 2).flatten(2), block.attn.proj)
    torch.testing.assert_close(y.view_as(tokens), block._attn(normed), rtol=0, atol=1e-4)


def test_token_surrounded_by_padding_attends_to_itself() -> None:
    weights = torch.full((1, 4, 1, 4, 4), 1 / 3)
    weights[..., range(4), range(4)] = 0
    each = AttentionMap(layer="attn", weights=weights, prefix=0, query_prefix=0, grid=(3, 3), window=(2, 2))
    assert each.full()[0, 0, 8].tolist() == [0.0] * 8 + [1.0]
    torch.testing.assert_close(each.full().sum(-1), torch.ones(1, 1, 9))


# Uniform attention


def test_uniform_attention_of_shifted_windows_respects_the_mask() -> None:
    model, images = build_family("swin")
    each = next(each for each in extract_attention(model, images)[1] if any(each.shift))
    masks = layer_inputs(model, images, [each.layer])[each.layer][1]
    assert masks.lt(0).any()
    n = math.prod(each.grid)
    y, x = torch.meshgrid(*(torch.arange(side) * 16.0 / side for side in each.grid), indexing="ij")
    entropies, distances = [], []
    for query in range(n):
        shared = [(key, same_window(each, query, key)) for key in range(n)]
        keys = [key for key, index in shared if index is not None and masks[index] == 0]
        entropies.append(math.log(len(keys)))
        lengths = [math.hypot(*(side.flatten()[query] - side.flatten()[key] for side in (y, x))) for key in keys]
        distances.append(sum(lengths) / len(keys))
    uniform = each.uniform()
    torch.testing.assert_close(uniform.entropy(), torch.tensor([[sum(entropies) / n]]))
    torch.testing.assert_close(uniform.distance(16), torch.tensor([[sum(distances) / n]]))


@torch.inference_mode()
def test_uniform_attention_with_lsa_excludes_the_token_itself() -> None:
    model, images = build_family("vit", patched=True)
    _, maps = extract_attention(model, images)
    torch.testing.assert_close(maps[0].uniform().entropy(), torch.tensor([[math.log(16)]]))
    _, maps = extract_attention(*build_family("vit"))
    torch.testing.assert_close(maps[0].uniform().entropy(), torch.tensor([[math.log(17)]]))


# Entropy, distance, image


def uniform_map(n: int, prefix: int, grid: tuple[int, int]) -> AttentionMap:
    return AttentionMap(
        layer="attn", weights=torch.full((2, 3, n, n), 1 / n), prefix=prefix, query_prefix=prefix, grid=grid
    )


def test_entropy_of_uniform_and_of_one_hot_attention() -> None:
    each = uniform_map(7, 1, (2, 3))
    torch.testing.assert_close(each.entropy(), torch.full((2, 3), math.log(7)))
    one_hot = replace(each, weights=torch.eye(7).expand(2, 3, -1, -1))
    assert one_hot.entropy().eq(0).all()


def test_distance_by_hand() -> None:
    weights = torch.zeros(1, 2, 7, 7)
    weights[:, 0, :, 3] = 1.0  # the top right token of 2 × 3 tokens of 10 pixels
    weights[:, 1] = torch.eye(7)
    each = AttentionMap(layer="attn", weights=weights, prefix=1, query_prefix=1, grid=(2, 3))
    expected = (20 + 10 + 0 + math.hypot(20, 10) + math.hypot(10, 10) + 10) / 6
    torch.testing.assert_close(each.distance((20, 30)), torch.tensor([[expected, 0.0]]))
    half = replace(
        each, weights=weights / 2 + F.pad(torch.ones(7, 1), (0, 6)) / 2
    )  # half of the attention is to the class token
    torch.testing.assert_close(half.distance((20, 30)), torch.tensor([[expected, 0.0]]))


def test_distance_to_the_centers_of_pooled_keys() -> None:
    weights = torch.tensor([1.0, 0.0]).expand(1, 1, 8, 2)  # 2 × 4 tokens of 10 pixels attend to the left half
    each = AttentionMap(layer="attn", weights=weights, prefix=0, query_prefix=0, grid=(1, 2), query_grid=(2, 4))
    near, far = math.hypot(5, 5), math.hypot(5, 15)
    expected = (near + near + far + math.hypot(5, 25)) / 4
    torch.testing.assert_close(each.distance((20, 40)), torch.tensor([[expected]]))
    torch.testing.assert_close(each.image()[0, 0], torch.tensor([[1.0, 0.0]]))


def test_class_attention_has_no_distance() -> None:
    each = AttentionMap(layer="attn", weights=torch.ones(1, 2, 1, 4) / 4, prefix=0, query_prefix=1, grid=(2, 2))
    assert each.distance(8).isnan().all()
    torch.testing.assert_close(each.image(), torch.full((1, 2, 2, 2), 0.25))


def test_image_of_class_token_and_of_pooled_tokens() -> None:
    weights = torch.rand(1, 1, 7, 7).softmax(dim=-1)
    each = AttentionMap(layer="attn", weights=weights, prefix=1, query_prefix=1, grid=(2, 3))
    class_token = replace(each, readout=(0,)).image()
    assert torch.equal(class_token[0, 0].flatten(), weights[0, 0, 0, 1:])
    patches = weights[..., 1:, 1:]
    pooled = replace(each, weights=patches, prefix=0, query_prefix=0).image()
    for received in (each.image(), pooled):
        torch.testing.assert_close(received[0, 0].flatten(), patches[0, 0].mean(dim=0))
    both = replace(each, prefix=2, query_prefix=2, grid=(1, 5), readout=(0, 1)).image()
    torch.testing.assert_close(both[0, 0, 0], (weights[0, 0, 0, 2:] + weights[0, 0, 1, 2:]) / 2)


# Errors and cleanup


def leftovers(model: nn.Module) -> list[str]:
    """Return hooks, modes and flags of a model and of torch."""
    hooks = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    flags = [f"{name} {module.training}" for name, module in model.named_modules()]
    return [*hooks, *flags, *map(str, _get_current_function_mode_stack()), torch._dynamo.eval_frame._stance.stance]


@pytest.mark.parametrize("layer", ["head", "blocks.1.attn.proj"])
def test_failed_forward_pass_is_cleaned_up(layer: str) -> None:
    model, images = build_family("vit average pool", patched=True)
    model.blocks[0].train()
    before, expected = leftovers(model), model(images)

    def fail(*_: object) -> None:
        raise RuntimeError("failed")

    hook = model.get_submodule(layer).register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="failed"):
        extract_attention(model, images)
    hook.remove()
    assert leftovers(model) == before
    assert torch.equal(extract_attention(model, images)[0], expected)
    assert leftovers(model) == before


def test_unsupported_models_are_one_line_errors() -> None:
    messages = {
        **dict.fromkeys(("resnet", "mixer"), "has no attention between tokens"),
        **dict.fromkeys(("nest", "xcit", "davit", "tnt"), r"attn\w* of \w+: .* without a known grid"),
    }
    for name, message in messages.items():
        model = build(name)
        before = leftovers(model)
        with pytest.raises(InputError, match=message) as error:
            extract_attention(model, zoo_images(name))
        assert "\n" not in str(error.value)
        assert leftovers(model) == before
