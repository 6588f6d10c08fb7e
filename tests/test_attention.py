"""Attention maps: of every family the softmax written out from its weights, whichever way the model computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import cait, swin_transformer, swin_transformer_v2
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import smallvit
from smallvit.attention.maps import AttentionMap, record
from smallvit.errors import InputError
from smallvit.models import create_model
from smallvit.plugins import Locality
from smallvit.published import ClassTalkingHeads

from .plugins.naive import linear, offsets, probabilities, split, swin_table, temperature
from .plugins.zoo import VIT, build, shaken
from .plugins.zoo import images as zoo_images

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
"""How each is built, its images, and prefix, prefix of the queries and grid, as they come one after the other."""
PLAIN_AND_PATCHED = pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])


def family(name: str, patched: bool = False) -> tuple[nn.Module, Tensor]:
    """A model and random images."""
    torch.manual_seed(0)
    make, sides, _ = FAMILIES[name]
    model = make()
    if patched:
        smallvit.patch(model, spt=True, lsa=True)
        shaken(model)
    return model.eval(), torch.randn(2, 3, *sides)


def given(model: nn.Module, images: Tensor, names: list[str]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What attention layers are given by a forward pass: tokens and the shift's mask."""
    found = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple, more: dict) -> None:
            found[name] = inputs[0], more.get("mask")

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in names]
    model(images)
    for hook in hooks:
        hook.remove()
    return found


def written_out(layer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(M(q kᵀ t + bias)) of a layer's weights."""
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
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * factor(layer, q.shape[-1]) + table(layer)
    if hasattr(layer, "proj_l"):
        scores = torch.einsum("bhij,gh->bgij", scores, layer.proj_l.weight)
        scores = scores if layer.proj_l.bias is None else scores + layer.proj_l.bias[:, None, None]
    alone = None
    if mask is not None:
        mask = mask.repeat(len(x) // len(mask), 1, 1)[:, None]
        scores = scores + mask
        alone = ((mask < 0) | torch.eye(mask.shape[-1], dtype=torch.bool)).all(dim=-1)
    return probabilities(scores, hidden, alone)


def factor(layer: nn.Module, width: int) -> Tensor | float:
    """What scores are multiplied by."""
    if isinstance(layer, swin_transformer_v2.WindowAttention):
        return layer.logit_scale.clamp(max=math.log(100)).exp()
    return temperature(layer) if isinstance(layer, Locality) else width**-0.5


def table(layer: nn.Module) -> Tensor | float:
    """Relative positions."""
    if isinstance(layer, swin_transformer.WindowAttention):
        return swin_table(layer.relative_position_bias_table, *layer.window_size)
    if isinstance(layer, swin_transformer_v2.WindowAttention):
        height, width = layer.window_size
        places = 8 * offsets(height, width) / torch.tensor([height - 1, width - 1])
        places = places.sign() * (places.abs() + 1).log2() / 3
        return 16 * layer.cpb_mlp(places).permute(2, 0, 1).sigmoid()
    return 0.0


@PLAIN_AND_PATCHED
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_maps_are_the_softmax_of_the_layers_weights_written_out(name: str, patched: bool) -> None:
    model, images = family(name, patched)
    _, maps = record(model, images)
    attending = [path for path, module in model.named_modules() if hasattr(module, "attn_drop")]
    assert [each.layer for each in maps] == attending
    inputs = given(model, images, attending)
    for each in maps:
        layer = model.get_submodule(each.layer)
        expected = written_out(layer, *inputs[each.layer])
        weights = each.weights if each.window is None else each.weights.flatten(0, 1)
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
        if patched and layer.masked and weights.shape[-1] > 1 and inputs[each.layer][1] is None:
            assert weights.diagonal(dim1=-2, dim2=-1).abs().max() == 0


@PLAIN_AND_PATCHED
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_logits_are_the_models_own_to_the_last_bit(name: str, patched: bool) -> None:
    model, images = family(name, patched)
    expected = model(images)
    logits, _ = record(model, images)
    assert torch.equal(logits, expected)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_it_is_known_how_tokens_lie(name: str) -> None:
    model, images = family(name)
    _, maps = record(model, images)
    layouts = [(each.prefix, each.query_prefix, each.grid) for each in maps]
    changes = [now for index, now in enumerate(layouts) if not index or now != layouts[index - 1]]
    assert changes == FAMILIES[name][2]
    for each in maps:
        torch.testing.assert_close(each.full().sum(-1), torch.ones(each.full().shape[:-1]))
        assert each.image().shape == (2, each.weights.shape[-3], *each.grid)


Lie = tuple[int, int, tuple[int, int], tuple[int, int] | None]
REDUCED: dict[str, tuple[tuple[int, int], dict[str, bool], list[Lie]]] = {
    "8 pixels": ((8, 8), {}, [(0, 0, (4, 4), (8, 8)), *((0, 0, (side, side), None) for side in (4, 2, 1))]),
    "oblong": (
        (16, 24),
        {},
        [(0, 0, (4, 6), (16, 24)), (0, 0, (4, 6), (8, 12)), (0, 0, (4, 6), None), (0, 0, (2, 3), None)],
    ),
    "class token": (
        (8, 8),
        {"gap_head": False},
        [(0, 0, (4, 4), (8, 8)), (0, 0, (4, 4), None), (0, 0, (2, 2), None), (1, 1, (1, 1), None)],
    ),
    "class token, oblong": (
        (16, 24),
        {"gap_head": False},
        [(0, 0, (4, 6), (16, 24)), (0, 0, (4, 6), (8, 12)), (0, 0, (4, 6), None), (1, 1, (2, 3), None)],
    ),
    "no pyramid": ((16, 16), {"pyramid": False}, [(0, 0, (4, 4), None)]),
    "no pyramid, class token": ((16, 16), {"pyramid": False, "gap_head": False}, [(1, 1, (4, 4), None)]),
}
"""BinaryViT of patches of a pixel: its images, its options, and prefixes, grid, that of queries if it is another."""


def reduced(name: str, binary: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    sides, options, _ = REDUCED[name]
    model = create_model("binaryvit_tiny", **SMALL | {"img_size": min(sides), "patch_size": 1}, **options)
    if not binary:
        smallvit.unpatch(model)
    model.set_input_size(sides)
    return shaken(model).eval(), torch.randn(2, 3, *sides)


@pytest.mark.parametrize("binary", [False, True], ids=["full precision", "binary"])
@pytest.mark.parametrize("name", REDUCED)
@torch.inference_mode()
def test_keys_of_fewer_places_have_a_grid_of_their_own(name: str, binary: bool) -> None:
    model, images = reduced(name, binary)
    expected = model(images)
    logits, maps = record(model, images)
    assert torch.equal(logits, expected)
    lies = [(each.prefix, each.query_prefix, each.grid, each.query_grid) for each in maps]
    assert [lie for index, lie in enumerate(lies) if not index or lie != lies[index - 1]] == REDUCED[name][2]
    for each in maps:
        queries = each.query_prefix + math.prod(each.query_grid or each.grid)
        assert each.weights.shape[-2:] == (queries, each.prefix + math.prod(each.grid))
        torch.testing.assert_close(each.full().sum(-1), torch.ones(each.full().shape[:-1]))
        assert each.image().shape == (2, each.weights.shape[1], *each.grid)
        assert each.reads == ((0,) if each.prefix else None)


@pytest.mark.parametrize("binary", [False, True], ids=["full precision", "binary"])
@torch.inference_mode()
def test_maps_of_reduced_keys_are_the_softmax_before_it_is_made_binary(binary: bool) -> None:
    model, images = reduced("8 pixels", binary)
    layer, found = model.stages[0].blocks[1].attn, []
    for part in (layer.q, layer.k):
        part.register_forward_hook(lambda _, inputs, output: found.append(output[0]))  # of one head
    _, maps = record(model, images)
    each = next(each for each in maps if each.layer == "stages.0.blocks.1.attn")
    q, k = found
    if binary:
        q, k = (
            torch.where(part + move >= 0, 1.0, -1.0) for part, move in zip(found, layer.moves.view(3, -1), strict=False)
        )
    expected = probabilities(q @ k.mT * q.shape[-1] ** -0.5, hidden=False)
    assert expected.shape == (64, 16)
    torch.testing.assert_close(each.weights[0, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "cait of timm", "pit", "swin, padded", "t2t"])
@PLAIN_AND_PATCHED
@torch.inference_mode()
def test_the_fused_kernel_and_plain_products_attend_alike(name: str, patched: bool) -> None:
    model, images = family(name, patched)
    found = []
    for fused in (True, False):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        found.append(record(model, images)[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=1e-4)  # rounding, over many layers


@pytest.mark.parametrize(
    "name",
    ["beit", "eva", "eva-02", "vit relpos", "vit differential", "convit", "caformer", "crossvit", "vit attention pool"],
)
@torch.inference_mode()
def test_other_families_of_timms_have_maps_too(name: str) -> None:
    model, images = build(name), zoo_images(name)
    logits, maps = record(model, images)
    assert torch.equal(logits, model(images))
    assert len({each.layer for each in maps}) == len(maps)
    for each in maps:
        torch.testing.assert_close(each.weights.sum(-1), torch.ones(each.weights.shape[:-1]))
        assert each.prefix + math.prod(each.grid) == each.weights.shape[-1]
        assert each.grid[0] == each.grid[1]


@torch.inference_mode()
def test_a_compiled_model_keeps_its_outputs_and_has_the_maps_of_the_plain_one() -> None:
    model, images = family("vit registers", patched=True)
    _, plain = record(model, images)

    def off_by_one(graph: nn.Module, _: list[Tensor]) -> Callable[..., tuple]:
        return lambda *inputs: tuple(output + 1 for output in graph(*inputs))

    compiled = torch.compile(model, backend=off_by_one)
    expected = compiled(images)
    assert not torch.equal(expected, model(images))
    logits, maps = record(compiled, images)
    assert torch.equal(logits, expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(images), expected)
    for one, other in zip(maps, plain, strict=True):
        assert one.layer == other.layer
        assert torch.equal(one.weights, other.weights)


@torch.inference_mode()
def test_blocks_that_are_compiled_one_by_one_have_maps() -> None:
    model, images = family("vit average pool")
    _, plain = record(model, images)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    _, maps = record(model, images)
    assert [each.layer for each in maps] == [each.layer for each in plain] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(torch.equal(one.weights, other.weights) for one, other in zip(maps, plain, strict=True))


@pytest.mark.parametrize("name", ["vit", "cait of timm", "swin", "t2t"])
@PLAIN_AND_PATCHED
@torch.inference_mode()
def test_maps_of_mixed_precision_are_in_fp32_and_like_those_of_full_precision(name: str, patched: bool) -> None:
    model, images = family(name, patched)
    _, full = record(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
        logits, maps = record(model, images)
    assert torch.equal(logits, expected)
    for one, other in zip(maps, full, strict=True):
        assert one.weights.dtype == torch.float32
        assert (one.weights - other.weights).abs().mean() < 0.01
        torch.testing.assert_close(one.weights.sum(-1), torch.ones(one.weights.shape[:-1]), rtol=0, atol=0.02)


def test_gradients_of_the_logits_are_the_models_own() -> None:
    model, images = family("swin", patched=True)
    expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    logits, maps = record(model, images)
    found = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not any(each.weights.requires_grad for each in maps)


def average_pooled(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return shaken(timm.create_model("vit_tiny_patch16_224", num_classes=5, global_pool="avg", **VIT, **more)).eval()


READERS = {
    **{name: lambda name=name: build(name) for name in ("vit", "vit registers", "vit average pool", "deit distilled")},
    **{name: lambda name=name: build(name) for name in ("beit", "eva-02", "dinov3", "rope mixed", "pit distilled")},
    "class token and average pool": average_pooled,
    "registers and average pool": lambda: average_pooled(class_token=False, reg_tokens=2),
    "convit": lambda: build("convit"),
    "t2t": ours("t2t"),
}


@pytest.mark.parametrize("name", READERS)
def test_those_tokens_are_read_of_which_the_logits_have_gradients(name: str) -> None:
    model = READERS[name]()
    images = zoo_images(name) if name == "convit" else torch.randn(2, 3, 16, 16)
    each = record(model, images)[1][-1]
    outputs = []
    block = model.get_submodule(each.layer.rpartition(".")[0])
    block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    logits = model(images)
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), outputs)
    found = gradient.abs().amax(dim=(0, 2)).nonzero().flatten().tolist()
    assert found == list(range(each.prefix, each.weights.shape[-2]) if each.reads is None else each.reads)


# Windows


def same_window(each: AttentionMap, one: int, other: int) -> tuple[int, int, int] | None:
    """The window of two tokens of the image and their places in it, or None where they are in two."""
    places = []
    for token in (one, other):
        row, column = (
            (at - step) % side
            for at, step, side in zip(divmod(token, each.grid[1]), each.shift, each.grid, strict=True)
        )
        across = -(-each.grid[1] // each.window[1])
        window = row // each.window[0] * across + column // each.window[1]
        places.append((window, row % each.window[0] * each.window[1] + column % each.window[1]))
    (first, query), (second, key) = places
    return (first, query, key) if first == second else None


def assembled(each: AttentionMap) -> Tensor:
    """The windows' weights in one matrix, token by token."""
    n = math.prod(each.grid)
    full = torch.zeros(each.weights.shape[0], each.weights.shape[2], n, n)
    for query, key in product(range(n), repeat=2):
        if (place := same_window(each, query, key)) is not None:
            window, i, j = place
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
def test_windows_are_put_back_in_place_without_padding(name: str, layer: str, padded: bool) -> None:
    model, images = family(name)
    _, maps = record(model, images)
    each = next(each for each in maps if each.layer == layer)
    expected = assembled(each)
    assert (expected == 0).float().mean() > 0.5
    assert (expected.sum(dim=-1) < 0.999).any() == padded
    expected = expected / expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(each.full(), expected)
    torch.testing.assert_close(each.image(), expected.mean(dim=2).unflatten(-1, each.grid))
    spread = -(expected * expected.clamp(min=1e-38).log()).sum(dim=-1).mean(dim=-1)
    torch.testing.assert_close(each.entropy(), spread)
    y, x = torch.meshgrid(*(torch.arange(side) * 16.0 / side for side in each.grid), indexing="ij")
    apart = torch.hypot(y.flatten()[:, None] - y.flatten(), x.flatten()[:, None] - x.flatten())
    torch.testing.assert_close(each.distance(16), (expected * apart).sum(dim=-1).mean(dim=-1))


@torch.inference_mode()
def test_the_values_that_a_shifted_block_gives_are_those_of_the_full_matrix() -> None:
    model, images = family("swin")
    _, maps = record(model, images)
    block = model.layers[1].blocks[1]
    full = next(each for each in maps if each.layer == "layers.1.blocks.1.attn").full()
    tokens, _ = given(model, images, ["layers.1.blocks.1"])["layers.1.blocks.1"]
    normed = block.norm1(tokens)
    v = split(linear(normed.flatten(1, 2), block.attn.qkv), block.attn.num_heads)[2]
    y = linear((full @ v).transpose(1, 2).flatten(2), block.attn.proj)
    torch.testing.assert_close(y.view_as(tokens), block._attn(normed), rtol=0, atol=1e-4)


def test_a_token_with_padding_alone_around_it_stays_with_itself() -> None:
    weights = torch.full((1, 4, 1, 4, 4), 1 / 3)
    weights[..., range(4), range(4)] = 0
    each = AttentionMap(layer="attn", weights=weights, prefix=0, query_prefix=0, grid=(3, 3), window=(2, 2))
    assert each.full()[0, 0, 8].tolist() == [0.0] * 8 + [1.0]
    torch.testing.assert_close(each.full().sum(-1), torch.ones(1, 1, 9))


# What would be if all were attended to alike


def test_in_shifted_windows_those_are_open_that_the_mask_leaves() -> None:
    model, images = family("swin")
    each = next(each for each in record(model, images)[1] if any(each.shift))
    masks = given(model, images, [each.layer])[each.layer][1]
    assert masks.lt(0).any()
    n = math.prod(each.grid)
    y, x = torch.meshgrid(*(torch.arange(side) * 16.0 / side for side in each.grid), indexing="ij")
    spread, way = [], []
    for query in range(n):
        places = [(key, same_window(each, query, key)) for key in range(n)]
        keys = [key for key, place in places if place is not None and masks[place] == 0]
        spread.append(math.log(len(keys)))
        ways = [math.hypot(*(side.flatten()[query] - side.flatten()[key] for side in (y, x))) for key in keys]
        way.append(sum(ways) / len(keys))
    even = each.even()
    torch.testing.assert_close(even.entropy(), torch.tensor([[sum(spread) / n]]))
    torch.testing.assert_close(even.distance(16), torch.tensor([[sum(way) / n]]))


@torch.inference_mode()
def test_lsa_leaves_all_open_but_the_token_itself() -> None:
    model, images = family("vit", patched=True)
    _, maps = record(model, images)
    torch.testing.assert_close(maps[0].even().entropy(), torch.tensor([[math.log(16)]]))
    _, maps = record(*family("vit"))
    torch.testing.assert_close(maps[0].even().entropy(), torch.tensor([[math.log(17)]]))


# What maps tell


def uniform(n: int, prefix: int, grid: tuple[int, int]) -> AttentionMap:
    return AttentionMap(
        layer="attn", weights=torch.full((2, 3, n, n), 1 / n), prefix=prefix, query_prefix=prefix, grid=grid
    )


def test_entropy_is_the_logarithm_of_the_number_of_keys_where_all_count_alike() -> None:
    each = uniform(7, 1, (2, 3))
    torch.testing.assert_close(each.entropy(), torch.full((2, 3), math.log(7)))
    certain = replace(each, weights=torch.eye(7).expand(2, 3, -1, -1))
    assert certain.entropy().eq(0).all()


def test_distance_is_the_mean_way_to_what_is_attended_to() -> None:
    weights = torch.zeros(1, 2, 7, 7)
    weights[:, 0, :, 3] = 1.0  # the token at the top right, of 2 × 3 tokens of 10 pixels
    weights[:, 1] = torch.eye(7)
    each = AttentionMap(layer="attn", weights=weights, prefix=1, query_prefix=1, grid=(2, 3))
    way = (20 + 10 + 0 + math.hypot(20, 10) + math.hypot(10, 10) + 10) / 6
    torch.testing.assert_close(each.distance((20, 30)), torch.tensor([[way, 0.0]]))
    half = replace(
        each, weights=weights / 2 + F.pad(torch.ones(7, 1), (0, 6)) / 2
    )  # half of it goes to the class token
    torch.testing.assert_close(half.distance((20, 30)), torch.tensor([[way, 0.0]]))


def test_distance_of_reduced_keys_is_that_between_their_middles_and_the_queries() -> None:
    weights = torch.tensor([1.0, 0.0]).expand(1, 1, 8, 2)  # of 2 × 4 tokens of 10 pixels, all ask the left half
    each = AttentionMap(layer="attn", weights=weights, prefix=0, query_prefix=0, grid=(1, 2), query_grid=(2, 4))
    near, far = math.hypot(5, 5), math.hypot(5, 15)
    way = (near + near + far + math.hypot(5, 25)) / 4
    torch.testing.assert_close(each.distance((20, 40)), torch.tensor([[way]]))
    torch.testing.assert_close(each.image()[0, 0], torch.tensor([[1.0, 0.0]]))


def test_class_attention_has_no_distance() -> None:
    each = AttentionMap(layer="attn", weights=torch.ones(1, 2, 1, 4) / 4, prefix=0, query_prefix=1, grid=(2, 2))
    assert each.distance(8).isnan().all()
    torch.testing.assert_close(each.image(), torch.full((1, 2, 2, 2), 0.25))


def test_images_show_where_the_class_token_looks_or_what_tokens_receive() -> None:
    weights = torch.rand(1, 1, 7, 7).softmax(dim=-1)
    each = AttentionMap(layer="attn", weights=weights, prefix=1, query_prefix=1, grid=(2, 3))
    looks = replace(each, reads=(0,)).image()
    assert torch.equal(looks[0, 0].flatten(), weights[0, 0, 0, 1:])
    patches = weights[..., 1:, 1:]
    receives = replace(each, weights=patches, prefix=0, query_prefix=0).image()
    for received in (each.image(), receives):
        torch.testing.assert_close(received[0, 0].flatten(), patches[0, 0].mean(dim=0))
    both = replace(each, prefix=2, query_prefix=2, grid=(1, 5), reads=(0, 1)).image()
    torch.testing.assert_close(both[0, 0, 0], (weights[0, 0, 0, 2:] + weights[0, 0, 1, 2:]) / 2)


# What cannot be shown, and what is left behind


def leftovers(model: nn.Module) -> list[str]:
    """Hooks, modes and flags that a model, or torch, has."""
    hooks = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    flags = [f"{name} {module.training}" for name, module in model.named_modules()]
    return [*hooks, *flags, *map(str, _get_current_function_mode_stack()), torch._dynamo.eval_frame._stance.stance]


@pytest.mark.parametrize("at", ["head", "blocks.1.attn.proj"])
def test_a_forward_pass_that_fails_leaves_nothing_behind(at: str) -> None:
    model, images = family("vit average pool", patched=True)
    model.blocks[0].train()
    before, expected = leftovers(model), model(images)

    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    hook = model.get_submodule(at).register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        record(model, images)
    hook.remove()
    assert leftovers(model) == before
    assert torch.equal(record(model, images)[0], expected)
    assert leftovers(model) == before


@pytest.mark.parametrize("name", ["resnet", "mixer"])
def test_a_model_without_attention_is_told_so_in_one_line(name: str) -> None:
    model = build(name)
    before = leftovers(model)
    with pytest.raises(InputError, match="has no attention between tokens") as error:
        record(model, zoo_images(name))
    assert "\n" not in str(error.value)
    assert leftovers(model) == before


@pytest.mark.parametrize("name", ["nest", "xcit", "davit", "tnt"])
def test_attention_whose_tokens_lie_otherwise_is_refused_by_its_layers_name(name: str) -> None:
    model = build(name)
    before = leftovers(model)
    with pytest.raises(InputError, match=r"attn\w* of \w+ attends with .* no grid that is known") as error:
        record(model, zoo_images(name))
    assert "\n" not in str(error.value)
    assert leftovers(model) == before
