"""Rollout and relevance: against loops over tokens, one by one, and attention computed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smallvit
from smallvit.attention.flow import relevance, rollout
from smallvit.attention.maps import AttentionMap, record
from smallvit.errors import InputError
from smallvit.models import create_model
from smallvit.plugins.binary import BinaryAttending

from .plugins.naive import join, linear, probabilities, split, temperature
from .plugins.zoo import VIT, build, images, shaken

Token = tuple[str, int] | tuple[int, int]


def ours(arch: str, patch_size: int) -> nn.Module:
    torch.manual_seed(0)
    return shaken(create_model(arch, img_size=16, patch_size=patch_size, num_classes=5)).eval()


def pooling(pool: str, **more: Any) -> nn.Module:
    """A ViT that pools its tokens."""
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
"""All of images of 16 pixels, whose grids are halved from stage to stage, if they change."""
CLASS, DISTILLED, POOLED, PROBED = [("prefix", 0)], [("prefix", 0), ("prefix", 1)], [], [("probe", 0)]
READ: dict[str, list[tuple[str, int]]] = {
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
"""What the head reads the mean of, where it is not the class token; POOLED: the image's tokens."""
PE = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


# Loops over tokens


def names(prefix: int, grid: tuple[int, int]) -> list[Token]:
    """Tokens as they stand side by side."""
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    return [*(("prefix", index) for index in range(prefix)), *places]


def followed(maps: list[AttentionMap], matrices: list[Tensor], kept: float, given: float, read: list[Token]) -> Tensor:
    """What the tokens hold that are read at last, those of the image where `read` names none.

    Each token that asks keeps `kept` of itself and is given `given` of what it attends to.
    `matrices` (n, m) are those of one image.
    """
    first = grid = maps[0].query_grid or maps[0].grid
    holds: dict[Token, Tensor] = {}
    for index, token in enumerate(names(0, first)):
        holds[token] = F.one_hot(torch.tensor(index), first[0] * first[1]).float()
    for each, matrix in zip(maps, matrices, strict=True):
        if (own := each.query_grid or each.grid) != grid:
            holds = merged(holds, grid, own)
            grid = own
        keys = names(each.prefix, each.grid)
        one = len(matrix) == 1 < len(keys)
        queries = (PROBED if read == PROBED else CLASS) if one else names(each.prefix, grid)
        for query in queries:
            holds.setdefault(query, torch.zeros(first[0] * first[1]))
        new, held = dict(holds), merged(holds, grid, each.grid)
        for i, query in enumerate(queries):
            new[query] = kept * holds[query]
            for j, key in enumerate(keys):
                new[query] = new[query] + given * matrix[i, j] * held[key]
        holds = new
    read = read or names(0, grid)
    return (sum(holds[token] for token in read) / len(read)).view(first)


def merged(holds: dict[Token, Tensor], finer: tuple[int, int], grid: tuple[int, int]) -> dict[Token, Tensor]:
    """Each token of the coarser grid, in equal parts of those that it covers."""
    down, right = finer[0] // grid[0], finer[1] // grid[1]
    new = {token: value for token, value in holds.items() if token[0] in ("prefix", "probe")}
    for row, column in names(0, grid):
        parts = [holds[row * down + y, column * right + x] for y in range(down) for x in range(right)]
        new[row, column] = sum(parts) / len(parts)
    return new


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_rollout_is_that_of_a_loop_over_layers_and_tokens(name: str, patched: bool) -> None:
    model = FAMILIES[name]()
    if patched:
        smallvit.patch(model, lsa=True)
    _, maps = record(model, X)
    found = rollout(maps)
    assert found.shape == (2, *maps[0].grid)
    for image in range(2):
        matrices = [each.full()[image].mean(dim=0) for each in maps]
        torch.testing.assert_close(
            found[image], followed(maps, matrices, 0.5, 0.5, READ.get(name, CLASS)), rtol=1e-4, atol=1e-6
        )


def softmaxes(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(5)).mul(3).softmax(dim=-1)


@pytest.mark.parametrize("prefix", [0, 1], ids=["pooled", "class token"])
def test_a_key_of_fewer_places_stands_for_those_that_it_covers(prefix: int) -> None:
    like = {"prefix": prefix, "query_prefix": prefix, "reads": (0,) if prefix else None}
    maps = [
        AttentionMap(layer="0", weights=softmaxes(2, prefix + 24, prefix + 6), grid=(2, 3), query_grid=(4, 6), **like),
        AttentionMap(layer="1", weights=softmaxes(3, prefix + 6, prefix + 1), grid=(1, 1), query_grid=(2, 3), **like),
    ]
    matrices = [each.full()[0].mean(dim=0) for each in maps]
    found = rollout(maps)[0]
    assert found.shape == (4, 6)
    torch.testing.assert_close(found, followed(maps, matrices, 0.5, 0.5, CLASS if prefix else POOLED))
    if not prefix:
        torch.testing.assert_close(found.sum(), torch.tensor(1.0))


def test_keys_of_fewer_places_by_hand() -> None:
    """One layer of 1 × 4 tokens: all ask the second of two keys, which are the means of two tokens each."""
    weights = torch.tensor([0.0, 1.0]).expand(1, 1, 4, 2)
    each = AttentionMap(layer="attn", weights=weights, prefix=0, query_prefix=0, grid=(1, 2), query_grid=(1, 4))
    assert rollout([each])[0].tolist() == [[0.125, 0.125, 0.125 + 0.25, 0.125 + 0.25]]


def binaryvit(side: int = 8, binary: bool = False, **parts: bool) -> nn.Module:
    torch.manual_seed(0)
    model = create_model("binaryvit_tiny", img_size=side, patch_size=1, num_classes=5, **parts)
    return shaken(model if binary else smallvit.unpatch(model)).eval()


REDUCED: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, int]], int]] = {
    "binaryvit": (binaryvit, POOLED, 8),
    "binaryvit, larger": (lambda: binaryvit(16), POOLED, 16),
    "binaryvit, class token": (lambda: binaryvit(gap_head=False), CLASS, 8),
    "binaryvit, no pyramid": (lambda: binaryvit(16, gap_head=False, pyramid=False), CLASS, 16),
    "pvt v2": (lambda: build("pvt v2"), POOLED, 64),
    "twins": (lambda: build("twins pcpvt"), POOLED, 64),
}


@pytest.mark.parametrize("name", REDUCED)
@torch.inference_mode()
def test_rollout_of_models_with_fewer_keys_is_that_of_a_loop(name: str) -> None:
    make, read, side = REDUCED[name]
    _, maps = record(make(), torch.randn(1, 3, side, side))
    assert (name == "binaryvit, no pyramid") == all(each.query_grid is None for each in maps)
    matrices = [each.full()[0].mean(dim=0) for each in maps]
    torch.testing.assert_close(rollout(maps)[0], followed(maps, matrices, 0.5, 0.5, read), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "size"), [("swin", 32), ("swin odd", 20), ("swin v2", 32), ("caformer", 64), ("pvt v2", 64)]
)
@torch.inference_mode()
def test_shares_sum_to_one_where_there_is_no_class_token(name: str, size: int) -> None:
    _, maps = record(build(name), torch.randn(2, 3, size, size))
    shares = rollout(maps)
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(dim=(1, 2)), torch.ones(2))


@torch.inference_mode()
def test_shares_that_are_not_the_images_are_the_class_tokens_own() -> None:
    weights = torch.zeros(1, 2, 5, 5)
    weights[:, 0, :, 0] = weights[:, 1, :, 1] = 1.0  # one head looks at the class token, one at the first patch
    each = AttentionMap(layer="attn", weights=weights, prefix=1, query_prefix=1, grid=(2, 2), reads=(0,))
    assert rollout([each])[0].tolist() == [[0.25, 0.0], [0.0, 0.0]]
    # twice: the class token, ¾ itself and ¼ patch; the patch, ¾ itself and ¼ class token
    assert rollout([each, each])[0].tolist() == [[0.75 * 0.25 + 0.25 * 0.75, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", ["pvt v2 linear", "hiera", "levit", "crossvit"])
def test_layers_that_cannot_be_followed_are_named(name: str) -> None:
    _, maps = record(build(name), images(name))
    with pytest.raises(InputError, match=r"attn") as error:
        rollout(maps)
    assert "\n" not in str(error.value)


# Relevance


def attended(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What an attention layer adds to the tokens, and its map."""
    q, k, v = split(linear(x, layer.qkv), layer.num_heads)
    hidden = getattr(layer, "masked", False)
    scores = q @ k.mT * (temperature(layer) if hidden else q.shape[-1] ** -0.5)
    if not hasattr(layer, "proj_l"):
        weights = probabilities(scores, hidden)
        return linear(join(weights @ v), layer.proj), weights
    weights = probabilities(mixed(scores, layer.proj_l), hidden)
    return linear(join(mixed(weights, layer.proj_w) @ v), layer.proj), weights


def mixed(values: Tensor, heads: nn.Linear) -> Tensor:
    """Talking heads."""
    return torch.einsum("bhij,gh->bgij", values, heads.weight) + heads.bias[:, None, None]


def probed(layer: nn.Module, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What one token receives, and its map."""
    (q,), (k,), (v,) = (split(each, layer.num_heads, 1) for each in (query, keys, values))
    weights = probabilities(q @ k.mT * q.shape[-1] ** -0.5, hidden=False)
    return linear(join(weights @ v), layer.proj), weights


def transformer(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The forward pass of a ViT, written out: logits, and the maps in their graph."""
    x, maps = model._pos_embed(model.patch_embed(x)), []
    for block in model.blocks:
        y, weights = attended(block.attn, block.norm1(x))
        x, maps = x + y, [*maps, weights]
        x = x + block.mlp(block.norm2(x))
    x, pool = model.norm(x), getattr(model, "attn_pool", None)
    if pool is None:
        return model.forward_head(x), maps
    keys, values = linear(x[:, model.num_prefix_tokens :], pool.kv).chunk(2, dim=-1)
    y, weights = probed(pool, linear(pool.latent.expand(len(x), -1, -1), pool.q), keys, values)
    y = y + pool.mlp(pool.norm(y))
    return model.head(model.fc_norm(y[:, 0])), [*maps, weights]


def class_attention(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The forward pass of a CaiT, written out: logits, and the maps in their graph."""
    x, maps = model.patch_embed(x) + model.pos_embed, []
    for block in model.blocks:
        y, weights = attended(block.attn, block.norm1(x))
        x, maps = x + block.gamma_1 * y, [*maps, weights]
        x = x + block.gamma_2 * block.mlp(block.norm2(x))
    token = model.cls_token.expand(len(x), -1, -1)
    for block in model.blocks_token_only:
        layer, u = block.attn, block.norm1(torch.cat([token, x], dim=1))
        y, weights = probed(layer, linear(u[:, :1], layer.q), linear(u, layer.k), linear(u, layer.v))
        token, maps = token + block.gamma_1 * y, [*maps, weights]
        token = token + block.gamma_2 * block.mlp(block.norm2(token))
    return linear(model.norm(token)[:, 0], model.head), maps


def gains(maps: list[Tensor], score: Tensor) -> list[Tensor]:
    """(∇A ⊙ A)⁺ of every map."""
    return [(a * g).clamp(min=0).detach() for a, g in zip(maps, torch.autograd.grad(score, maps), strict=True)]


WRITTEN_OUT = {
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
@pytest.mark.parametrize("name", [*WRITTEN_OUT, "vit, patched", "deit distilled, patched"])
def test_relevance_is_that_of_a_transformer_written_out(name: str, classes: list[int] | None) -> None:
    name, _, patched = name.partition(", ")
    model = FAMILIES[name]()
    if patched:
        smallvit.patch(model, spt=True, lsa=True)
        shaken(model)
    logits, weights = WRITTEN_OUT[name](model, X)
    torch.testing.assert_close(logits, model(X), rtol=1e-4, atol=1e-4)
    wanted = logits.argmax(dim=1) if classes is None else torch.tensor(classes)
    matrices = [gain.mean(dim=1) for gain in gains(weights, logits[range(2), wanted].sum())]
    found = relevance(model, X, classes and torch.tensor(classes))
    _, maps = record(model, X)
    for image in range(2):
        expected = followed(maps, [matrix[image] for matrix in matrices], 1.0, 1.0, READ.get(name, CLASS))
        torch.testing.assert_close(found[image], expected, rtol=1e-3, atol=1e-6)


def test_where_the_class_heads_weights_are_zero_relevance_is_half_that_of_the_distillation_token() -> None:
    torch.manual_seed(0)
    one_layer = VIT | {"depth": 1, "num_classes": 5}
    model = shaken(timm.create_model("deit_tiny_distilled_patch16_224", **one_layer)).eval()
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)
    logits, (weights,) = transformer(model, X)
    (gain,) = gains([weights], logits.max(dim=1).values.sum())
    assert gain[:, :, 0].eq(0).all()
    torch.testing.assert_close(relevance(model, X).flatten(1), gain.mean(dim=1)[:, 1, 2:] / 2)


def test_relevance_goes_through_swins_windows() -> None:
    model = build("swin to one token")
    seen = []
    hooks = [
        module.register_forward_hook(lambda _, inputs, output: seen.append(output))
        for module in model.modules()
        if isinstance(module, nn.Softmax)
    ]
    score = model(X).max(dim=1).values.sum()
    for hook in hooks:
        hook.remove()
    found = relevance(model, X)
    _, maps = record(model, X)
    by_window = [gain.unflatten(0, (2, -1)).mean(dim=2) for gain in gains(seen, score)]
    for image in range(2):
        matrices = [in_place(each, gain[image]) for each, gain in zip(maps, by_window, strict=True)]
        torch.testing.assert_close(found[image], followed(maps, matrices, 1.0, 1.0, POOLED), rtol=1e-3, atol=1e-6)


def in_place(each: AttentionMap, windows: Tensor) -> Tensor:
    """The windows' values (w, n, n) between the tokens of an image that they divide."""
    (rows, columns), (high, wide) = each.grid, each.window
    matrix = torch.zeros(rows * columns, rows * columns)
    for window, values in enumerate(windows):
        tokens = []
        for place in range(high * wide):
            row = window // (columns // wide) * high + place // wide + each.shift[0]
            column = window % (columns // wide) * wide + place % wide + each.shift[1]
            tokens.append(row % rows * columns + column % columns)
        for i, query in enumerate(tokens):
            for j, key in enumerate(tokens):
                matrix[query, key] = values[i, j]
    return matrix


@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_leaves_the_model_as_it_is(name: str) -> None:
    model = FAMILIES[name]()
    before = model(X)
    found = relevance(model, X)
    assert (found >= 0).all()
    assert found.max() > 0
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(X), before)


def like(values: Tensor, slopes: Tensor) -> Tensor:
    """Values with the gradient of others."""
    return slopes + (values - slopes).detach()


BINARY: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, int]]]] = {
    "binaryvit": (lambda: binaryvit(16, binary=True), POOLED),
    "binaryvit, class token": (lambda: binaryvit(16, binary=True, gap_head=False), CLASS),
    "vit": (lambda: smallvit.patch(ours("vit", 4), binary=True), CLASS),
    "vit, lsa": (lambda: smallvit.patch(ours("vit", 4), lsa=True, binary=True), CLASS),
}


@pytest.mark.parametrize("name", BINARY)
def test_relevance_of_binary_attention_is_that_of_its_binary_maps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, read = BINARY[name]
    model, binary = make().eval(), []
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, BinaryAttending):
                layer.log_step.fill_(math.log(0.07))  # some are above and some below

    def products(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: Any, bias: Any = None, _: Any = 0) -> Tensor:
        moved = zip((q, k, v), layer.moves.view(3, layer.num_heads, 1, -1), strict=True)
        q, k, v = (
            like(torch.where(x >= 0, 1.0, -1.0), x.clamp(-1, 1) * (2 - x.clamp(-1, 1).abs())) for x in map(sum, moved)
        )
        p = (q @ k.mT * scale + (0 if bias is None else bias)).softmax(dim=-1)
        step = layer.log_step.exp()
        binary.append(like((p > step / 2) * step, p.clamp(max=step.detach())))
        return binary[-1] @ v

    found = relevance(model, X)
    _, maps = record(model, X)
    for attending in {type(layer) for layer in model.modules() if isinstance(layer, BinaryAttending)}:
        monkeypatch.setattr(attending, "products", products)
    score = model(X).max(dim=1).values.sum()
    matrices = [gain.mean(dim=1) for gain in gains(binary, score)]
    assert any((each == 0).any() and (each > 0).any() for each in binary)
    assert max(each.max() for each in matrices) > 0
    for image in range(2):
        expected = followed(maps, [matrix[image] for matrix in matrices], 1.0, 1.0, read)
        torch.testing.assert_close(found[image], expected, rtol=1e-3, atol=1e-6)


def test_relevance_asks_for_no_gradients_of_the_model_or_the_caller() -> None:
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


def test_relevance_is_the_same_compiled_and_with_gradient_checkpointing() -> None:
    model = build("vit")
    expected = relevance(model, X)
    assert torch.equal(relevance(torch.compile(model, backend="eager"), X), expected)
    model.set_grad_checkpointing(True)
    assert torch.equal(relevance(model, X), expected)
    assert model.grad_checkpointing
    model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        relevance(model, X)
    assert model.grad_checkpointing


def test_relevance_of_one_layer_by_hand() -> None:
    """All look at all alike, and the logit is the first value of what the class token then holds."""
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "num_classes": 2}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    model.norm, model.blocks[0].mlp = nn.Identity(), Nothing()
    layer = model.blocks[0].attn
    layer.proj = nn.Identity()
    with torch.no_grad():
        layer.qkv.weight[:16], layer.qkv.bias[:16] = 0, 0
        model.head.weight.copy_(torch.eye(2, 8).flip(0))
    values = []
    layer.qkv.register_forward_hook(lambda _, inputs, output: values.append(output[..., 16]))
    found = relevance(model, X[..., :8, :8], torch.tensor([1, 1]))
    assert (values[0] > 0).any()
    assert (values[0] < 0).any()
    torch.testing.assert_close(found.flatten(1), values[0][:, 1:].detach().clamp(min=0) / 5)


class Nothing(nn.Module):
    """Adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_a_class_that_is_none_is_named() -> None:
    with pytest.raises(InputError, match=r"classes \[0, 5\]: the model's are 0 to 4"):
        relevance(build("vit"), X, torch.tensor([0, 5]))


def test_a_cnn_has_no_relevance() -> None:
    with pytest.raises(InputError, match="has no attention between tokens"):
        relevance(build("resnet"), images("resnet"))
