"""Test rollout and relevance against loops over single tokens, and against forward passes written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smallvit
from smallvit.attention.maps import AttentionMap, extract_attention
from smallvit.attention.rollout import relevance, rollout
from smallvit.models.factory import create_model
from smallvit.plugins.binary_layers import BinaryAttending
from smallvit.utils.errors import InputError

from ..plugins.naive import join, linear, probabilities, split, temperature
from ..plugins.zoo import VIT, build, images, shaken
from .test_maps import check_each

Token = tuple[str, int] | tuple[int, int]


def ours(arch: str, patch_size: int) -> nn.Module:
    torch.manual_seed(0)
    return shaken(create_model(arch, img_size=16, patch_size=patch_size, num_classes=5)).eval()


def pooling(pool: str, **more: Any) -> nn.Module:
    """Build a ViT that pools its tokens."""
    torch.manual_seed(0)
    return shaken(timm.create_model("vit_tiny_patch16_224", **VIT, num_classes=5, global_pool=pool, **more)).eval()


def with_prefix_pooled() -> nn.Module:
    model = pooling("avg", reg_tokens=2)
    model.pool_include_prefix = True
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: build("vit"),
    "deit distilled": lambda: build("deit distilled"),
    "vit average pool": lambda: build("vit average pool"),
    "cait": lambda: ours("cait", 4),
    "cait of timm": lambda: build("cait"),
    "pit": lambda: build("pit distilled"),
    "swin": lambda: build("swin to one token"),
    "t2t": lambda: ours("t2t", 4),
    "vit registers": lambda: build("vit registers"),
    "beit": lambda: build("beit"),
    "dinov3": lambda: build("dinov3"),
    "class token and average pool": lambda: pooling("avg"),
    "registers and average pool": lambda: pooling("avg", class_token=False, reg_tokens=2),
    "all tokens pooled": with_prefix_pooled,
    "class token and attention pool": lambda: pooling("map"),
    "registers and attention pool": lambda: pooling("map", class_token=False, reg_tokens=2),
    "pe": lambda: shaken(timm.create_model("vit_pe_core_tiny_patch16_384", num_classes=5, **PE)).eval(),
    "class token and prr pool": lambda: pooling("prr"),
}
"""Models for 16-pixel images; grids that change are halved from stage to stage."""
CLASS, DISTILLED, POOLED, PROBED = [("prefix", 0)], [("prefix", 0), ("prefix", 1)], [], [("probe", 0)]
READOUTS: dict[str, list[tuple[str, int]]] = {
    "deit distilled": DISTILLED,
    "pit": DISTILLED,
    "vit average pool": POOLED,
    "swin": POOLED,
    "beit": POOLED,
    "dinov3": POOLED,
    "class token and average pool": POOLED,
    "registers and average pool": POOLED,
    "all tokens pooled": [("prefix", 0), ("prefix", 1), ("prefix", 2), *((i, j) for i in range(4) for j in range(4))],
    "class token and attention pool": PROBED,
    "registers and attention pool": PROBED,
    "pe": PROBED,
}
"""Tokens whose mean the classifier reads, if not the class token; POOLED stands for the image tokens."""
PE = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


# Loops over tokens


def names(prefix: int, grid: tuple[int, int]) -> list[Token]:
    """Return the tokens in their order."""
    patches = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    return [*(("prefix", index) for index in range(prefix)), *patches]


def propagate(
    maps: list[AttentionMap], matrices: list[Tensor], keep: float, add: float, readout: list[Token]
) -> Tensor:
    """Return the mean share vector of the readout tokens (image tokens if empty), token by token.

    Each query keeps `keep` times its vector and adds `add` times those of the keys, weighted by `matrices` (n, m) of
    one image.
    """
    first = grid = maps[0].query_grid or maps[0].grid
    vectors: dict[Token, Tensor] = {}
    for index, token in enumerate(names(0, first)):
        vectors[token] = F.one_hot(torch.tensor(index), first[0] * first[1]).float()
    for each, matrix in zip(maps, matrices, strict=True):
        if (own := each.query_grid or each.grid) != grid:
            vectors = merge(vectors, grid, own)
            grid = own
        keys = names(each.prefix, each.grid)
        one = len(matrix) == 1 < len(keys)
        queries = (PROBED if readout == PROBED else CLASS) if one else names(each.prefix, grid)
        for query in queries:
            vectors.setdefault(query, torch.zeros(first[0] * first[1]))
        new, pooled = dict(vectors), merge(vectors, grid, each.grid)
        for i, query in enumerate(queries):
            new[query] = keep * vectors[query]
            for j, key in enumerate(keys):
                new[query] = new[query] + add * matrix[i, j] * pooled[key]
        vectors = new
    readout = readout or names(0, grid)
    return (sum(vectors[token] for token in readout) / len(readout)).view(first)


def merge(vectors: dict[Token, Tensor], finer: tuple[int, int], grid: tuple[int, int]) -> dict[Token, Tensor]:
    """Average the vectors of the tokens that each token of a coarser grid covers."""
    down, right = finer[0] // grid[0], finer[1] // grid[1]
    new = {token: value for token, value in vectors.items() if token[0] in ("prefix", "probe")}
    for row, column in names(0, grid):
        parts = [vectors[row * down + y, column * right + x] for y in range(down) for x in range(right)]
        new[row, column] = sum(parts) / len(parts)
    return new


@torch.inference_mode()
def test_rollout_matches_loop_over_layers_and_tokens() -> None:
    def check(name: str, patched: bool) -> None:
        model = FAMILIES[name]()
        if patched:
            smallvit.patch(model, lsa=True)
        _, maps = extract_attention(model, X)
        actual = rollout(maps)
        assert actual.shape == (2, *maps[0].grid)
        for image in range(2):
            matrices = [each.full()[image].mean(dim=0) for each in maps]
            expected = propagate(maps, matrices, 0.5, 0.5, READOUTS.get(name, CLASS))
            torch.testing.assert_close(actual[image], expected, rtol=1e-4, atol=1e-6)

    check_each(product(FAMILIES, (False, True)), check)


def softmaxes(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(5)).mul(3).softmax(dim=-1)


@pytest.mark.parametrize("prefix", [0, 1], ids=["pooled", "class token"])
def test_pooled_key_stands_for_the_tokens_that_it_covers(prefix: int) -> None:
    like = {"prefix": prefix, "query_prefix": prefix, "readout": (0,) if prefix else None}
    maps = [
        AttentionMap(layer="0", weights=softmaxes(2, prefix + 24, prefix + 6), grid=(2, 3), query_grid=(4, 6), **like),
        AttentionMap(layer="1", weights=softmaxes(3, prefix + 6, prefix + 1), grid=(1, 1), query_grid=(2, 3), **like),
    ]
    matrices = [each.full()[0].mean(dim=0) for each in maps]
    actual = rollout(maps)[0]
    assert actual.shape == (4, 6)
    torch.testing.assert_close(actual, propagate(maps, matrices, 0.5, 0.5, CLASS if prefix else POOLED))
    if not prefix:
        torch.testing.assert_close(actual.sum(), torch.tensor(1.0))


def test_rollout_of_pooled_keys_by_hand() -> None:
    """Let all of 1 × 4 tokens attend to the second of two keys, each the mean of two tokens."""
    weights = torch.tensor([0.0, 1.0]).expand(1, 1, 4, 2)
    each = AttentionMap(layer="attn", weights=weights, prefix=0, query_prefix=0, grid=(1, 2), query_grid=(1, 4))
    assert rollout([each])[0].tolist() == [[0.125, 0.125, 0.125 + 0.25, 0.125 + 0.25]]


def binaryvit(side: int = 8, binary: bool = False, **parts: bool) -> nn.Module:
    torch.manual_seed(0)
    model = create_model("binaryvit_tiny", img_size=side, patch_size=1, num_classes=5, **parts)
    return shaken(model if binary else smallvit.unpatch(model)).eval()


POOLED_KEYS: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, int]], int]] = {
    "binaryvit": (binaryvit, POOLED, 8),
    "binaryvit, larger": (lambda: binaryvit(16), POOLED, 16),
    "binaryvit, class token": (lambda: binaryvit(avg_pool_head=False), CLASS, 8),
    "binaryvit, no pyramid": (lambda: binaryvit(16, avg_pool_head=False, pyramid=False), CLASS, 16),
    "pvt v2": (lambda: build("pvt v2"), POOLED, 64),
    "twins": (lambda: build("twins pcpvt"), POOLED, 64),
}


@pytest.mark.parametrize("name", POOLED_KEYS)
@torch.inference_mode()
def test_rollout_of_pooled_keys_matches_loop(name: str) -> None:
    make, readout, side = POOLED_KEYS[name]
    _, maps = extract_attention(make(), torch.randn(1, 3, side, side))
    assert (name == "binaryvit, no pyramid") == all(each.query_grid is None for each in maps)
    matrices = [each.full()[0].mean(dim=0) for each in maps]
    torch.testing.assert_close(rollout(maps)[0], propagate(maps, matrices, 0.5, 0.5, readout), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "size"), [("swin", 32), ("swin odd", 20), ("swin v2", 32), ("caformer", 64), ("pvt v2", 64)]
)
@torch.inference_mode()
def test_rollout_sums_to_one_without_class_token(name: str, size: int) -> None:
    _, maps = extract_attention(build(name), torch.randn(2, 3, size, size))
    shares = rollout(maps)
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(dim=(1, 2)), torch.ones(2))


@torch.inference_mode()
def test_class_token_keeps_the_rest_of_rollout() -> None:
    weights = torch.zeros(1, 2, 5, 5)
    weights[:, 0, :, 0] = weights[:, 1, :, 1] = 1.0  # one head attends to the class token, one to the first patch
    each = AttentionMap(layer="attn", weights=weights, prefix=1, query_prefix=1, grid=(2, 2), readout=(0,))
    assert rollout([each])[0].tolist() == [[0.25, 0.0], [0.0, 0.0]]
    # twice: the class token, ¾ itself and ¼ patch; the patch, ¾ itself and ¼ class token
    assert rollout([each, each])[0].tolist() == [[0.75 * 0.25 + 0.25 * 0.75, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", ["pvt v2 linear", "hiera", "levit", "crossvit"])
def test_unsupported_layers_are_named(name: str) -> None:
    _, maps = extract_attention(build(name), images(name))
    with pytest.raises(InputError, match=r"attn") as error:
        rollout(maps)
    assert "\n" not in str(error.value)


# Relevance


def attend(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of an attention layer, and its map."""
    q, k, v = split(linear(x, layer.qkv), layer.num_heads)
    hidden = getattr(layer, "masked", False)
    scores = q @ k.mT * (temperature(layer) if hidden else q.shape[-1] ** -0.5)
    if not hasattr(layer, "proj_l"):
        weights = probabilities(scores, hidden)
        return linear(join(weights @ v), layer.proj), weights
    weights = probabilities(mix_heads(scores, layer.proj_l), hidden)
    return linear(join(mix_heads(weights, layer.proj_w) @ v), layer.proj), weights


def mix_heads(values: Tensor, heads: nn.Linear) -> Tensor:
    """Mix the heads (talking heads)."""
    return torch.einsum("bhij,gh->bgij", values, heads.weight) + heads.bias[:, None, None]


def attend_single(layer: nn.Module, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of a layer with one query, and its map."""
    (q,), (k,), (v,) = (split(each, layer.num_heads, 1) for each in (query, keys, values))
    weights = probabilities(q @ k.mT * q.shape[-1] ** -0.5, hidden=False)
    return linear(join(weights @ v), layer.proj), weights


def transformer(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run the forward pass of a ViT, and return logits and maps in the graph."""
    x, maps = model._pos_embed(model.patch_embed(x)), []
    for block in model.blocks:
        y, weights = attend(block.attn, block.norm1(x))
        x, maps = x + y, [*maps, weights]
        x = x + block.mlp(block.norm2(x))
    x, pool = model.norm(x), getattr(model, "attn_pool", None)
    if pool is None:
        return model.forward_head(x), maps
    keys, values = linear(x[:, model.num_prefix_tokens :], pool.kv).chunk(2, dim=-1)
    y, weights = attend_single(pool, linear(pool.latent.expand(len(x), -1, -1), pool.q), keys, values)
    y = y + pool.mlp(pool.norm(y))
    return model.head(model.fc_norm(y[:, 0])), [*maps, weights]


def class_attention(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run the forward pass of a CaiT, and return logits and maps in the graph."""
    x, maps = model.patch_embed(x) + model.pos_embed, []
    for block in model.blocks:
        y, weights = attend(block.attn, block.norm1(x))
        x, maps = x + block.gamma_1 * y, [*maps, weights]
        x = x + block.gamma_2 * block.mlp(block.norm2(x))
    token = model.cls_token.expand(len(x), -1, -1)
    for block in model.blocks_token_only:
        layer, u = block.attn, block.norm1(torch.cat([token, x], dim=1))
        y, weights = attend_single(layer, linear(u[:, :1], layer.q), linear(u, layer.k), linear(u, layer.v))
        token, maps = token + block.gamma_1 * y, [*maps, weights]
        token = token + block.gamma_2 * block.mlp(block.norm2(token))
    return linear(model.norm(token)[:, 0], model.head), maps


def weight_by_gradient(maps: list[Tensor], score: Tensor) -> list[Tensor]:
    """Return (∇A ⊙ A)⁺ of every map."""
    return [(a * g).clamp(min=0).detach() for a, g in zip(maps, torch.autograd.grad(score, maps), strict=True)]


REFERENCES = {
    "vit": transformer,
    "deit distilled": transformer,
    "vit average pool": transformer,
    "vit registers": transformer,
    "class token and average pool": transformer,
    "registers and average pool": transformer,
    "class token and attention pool": transformer,
    "registers and attention pool": transformer,
    "cait of timm": class_attention,
}


@pytest.mark.parametrize("classes", [None, [3, 1]], ids=["predicted", "chosen"])
@pytest.mark.parametrize("name", [*REFERENCES, "vit, patched", "deit distilled, patched"])
def test_relevance_matches_reference_forward_pass(name: str, classes: list[int] | None) -> None:
    name, _, patched = name.partition(", ")
    model = FAMILIES[name]()
    if patched:
        smallvit.patch(model, spt=True, lsa=True)
        shaken(model)
    logits, weights = REFERENCES[name](model, X)
    torch.testing.assert_close(logits, model(X), rtol=1e-4, atol=1e-4)
    targets = logits.argmax(dim=1) if classes is None else torch.tensor(classes)
    matrices = [gain.mean(dim=1) for gain in weight_by_gradient(weights, logits[range(2), targets].sum())]
    actual = relevance(model, X, classes and torch.tensor(classes))
    _, maps = extract_attention(model, X)
    for image in range(2):
        expected = propagate(maps, [matrix[image] for matrix in matrices], 1.0, 1.0, READOUTS.get(name, CLASS))
        torch.testing.assert_close(actual[image], expected, rtol=1e-3, atol=1e-6)


def test_relevance_is_half_that_of_the_distillation_token_if_the_class_head_is_zero() -> None:
    torch.manual_seed(0)
    one_layer = VIT | {"depth": 1, "num_classes": 5}
    model = shaken(timm.create_model("deit_tiny_distilled_patch16_224", **one_layer)).eval()
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)
    logits, (weights,) = transformer(model, X)
    (gain,) = weight_by_gradient([weights], logits.max(dim=1).values.sum())
    assert gain[:, :, 0].eq(0).all()
    torch.testing.assert_close(relevance(model, X).flatten(1), gain.mean(dim=1)[:, 1, 2:] / 2)


def test_relevance_of_shifted_windows() -> None:
    model = build("swin to one token")
    weights = []
    hooks = [
        module.register_forward_hook(lambda _, inputs, output: weights.append(output))
        for module in model.modules()
        if isinstance(module, nn.Softmax)
    ]
    score = model(X).max(dim=1).values.sum()
    for hook in hooks:
        hook.remove()
    actual = relevance(model, X)
    _, maps = extract_attention(model, X)
    by_window = [gain.unflatten(0, (2, -1)).mean(dim=2) for gain in weight_by_gradient(weights, score)]
    for image in range(2):
        matrices = [merge_windows(each, gain[image]) for each, gain in zip(maps, by_window, strict=True)]
        torch.testing.assert_close(actual[image], propagate(maps, matrices, 1.0, 1.0, POOLED), rtol=1e-3, atol=1e-6)


def merge_windows(each: AttentionMap, windows: Tensor) -> Tensor:
    """Merge the values of windows (w, n, n) into a matrix over all tokens of an image."""
    (rows, columns), (high, wide) = each.grid, each.window
    matrix = torch.zeros(rows * columns, rows * columns)
    for window, values in enumerate(windows):
        tokens = []
        for index in range(high * wide):
            row = window // (columns // wide) * high + index // wide + each.shift[0]
            column = window % (columns // wide) * wide + index % wide + each.shift[1]
            tokens.append(row % rows * columns + column % columns)
        for i, query in enumerate(tokens):
            for j, key in enumerate(tokens):
                matrix[query, key] = values[i, j]
    return matrix


@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_leaves_the_model_unchanged(name: str) -> None:
    model = FAMILIES[name]()
    before = model(X)
    actual = relevance(model, X)
    assert (actual >= 0).all()
    assert actual.max() > 0
    assert not actual.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(X), before)


def straight_through(values: Tensor, surrogate: Tensor) -> Tensor:
    """Return values with the gradient of a surrogate."""
    return surrogate + (values - surrogate).detach()


BINARY: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, int]]]] = {
    "binaryvit": (lambda: binaryvit(16, binary=True), POOLED),
    "binaryvit, class token": (lambda: binaryvit(16, binary=True, avg_pool_head=False), CLASS),
    "vit": (lambda: smallvit.patch(ours("vit", 4), binary=True), CLASS),
    "vit, lsa": (lambda: smallvit.patch(ours("vit", 4), lsa=True, binary=True), CLASS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BINARY)
def test_relevance_of_binary_attention_uses_binary_maps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, readout = BINARY[name]
    model, binary = make().eval(), []
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, BinaryAttending):
                layer.log_step.fill_(math.log(0.07))  # some are above and some below

    def products(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: Any, bias: Any = None, _: Any = 0) -> Tensor:
        moved = zip((q, k, v), layer.moves.view(3, layer.num_heads, 1, -1), strict=True)
        q, k, v = (
            straight_through(torch.where(x >= 0, 1.0, -1.0), x.clamp(-1, 1) * (2 - x.clamp(-1, 1).abs()))
            for x in map(sum, moved)
        )
        p = (q @ k.mT * scale + (0 if bias is None else bias)).softmax(dim=-1)
        step = layer.log_step.exp()
        binary.append(straight_through((p > step / 2) * step, p.clamp(max=step.detach())))
        return binary[-1] @ v

    actual = relevance(model, X)
    _, maps = extract_attention(model, X)
    for attending in {type(layer) for layer in model.modules() if isinstance(layer, BinaryAttending)}:
        monkeypatch.setattr(attending, "products", products)
    score = model(X).max(dim=1).values.sum()
    matrices = [gain.mean(dim=1) for gain in weight_by_gradient(binary, score)]
    assert any((each == 0).any() and (each > 0).any() for each in binary)
    assert max(each.max() for each in matrices) > 0
    for image in range(2):
        expected = propagate(maps, [matrix[image] for matrix in matrices], 1.0, 1.0, readout)
        torch.testing.assert_close(actual[image], expected, rtol=1e-3, atol=1e-6)


def test_relevance_of_frozen_models_in_inference_mode_and_mixed_precision() -> None:
    model = build("vit")
    expected = relevance(model, X)
    model.requires_grad_(False)
    with torch.inference_mode():
        assert torch.equal(relevance(model, X.clone()), expected)
        with torch.autocast("cpu", torch.bfloat16):
            model(X)
            half = relevance(model, X)
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.slow
def test_relevance_of_compiled_model_is_unchanged() -> None:
    model = build("vit")
    assert torch.equal(relevance(torch.compile(model, backend="eager"), X), relevance(model, X))


def test_relevance_of_one_layer_by_hand() -> None:
    """Attention is uniform, and the logit is the first value of the class token after it."""
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "num_classes": 2}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    model.norm, model.blocks[0].mlp = nn.Identity(), Zero()
    layer = model.blocks[0].attn
    layer.proj = nn.Identity()
    with torch.no_grad():
        layer.qkv.weight[:16], layer.qkv.bias[:16] = 0, 0
        model.head.weight.copy_(torch.eye(2, 8).flip(0))
    values = []
    layer.qkv.register_forward_hook(lambda _, inputs, output: values.append(output[..., 16]))
    actual = relevance(model, X[..., :8, :8], torch.tensor([1, 1]))
    assert (values[0] > 0).any()
    assert (values[0] < 0).any()
    torch.testing.assert_close(actual.flatten(1), values[0][:, 1:].detach().clamp(min=0) / 5)


class Zero(nn.Module):
    """Return zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_class_out_of_range_is_an_error() -> None:
    with pytest.raises(InputError, match=r"classes \[0, 5\]: expected 0 to 4"):
        relevance(build("vit"), X, torch.tensor([0, 5]))


def test_cnn_has_no_relevance() -> None:
    with pytest.raises(InputError, match="has no attention between tokens"):
        relevance(build("resnet"), images("resnet"))
