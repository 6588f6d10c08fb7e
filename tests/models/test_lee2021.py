"""Test the paper's architectures without its plugins: sizes, initialization, and T2T against the equations."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.cait import Cait
from timm.models.pit import PoolingVisionTransformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import nn

import smallvit
from smallvit.models import lee2021
from smallvit.models.architectures import LEE2021
from smallvit.models.lee2021 import ClassTalkingHeads, TalkingHeads
from smallvit.models.t2t import T2TViT, TokenAttention, Unfold, sincos_1d
from smallvit.profiling.flops import count_macs, count_parameters
from smallvit.utils.errors import InputError

ARCHITECTURES = tuple(LEE2021)


def build(
    arch: str,
    img_size: int | tuple[int, int] = 32,
    num_classes: int = 10,
    in_chans: int = 3,
    drop_path: float = 0.1,
    patch_size: int | None = None,
) -> nn.Module:
    if patch_size is None:
        patch_size = (4 if img_size != 64 else 8) // (2 if arch in ("pit", "swin") else 1)
    return (T2TViT if arch == "t2t" else getattr(lee2021, arch))(
        img_size=img_size, patch_size=patch_size, num_classes=num_classes, in_chans=in_chans, drop_path_rate=drop_path
    )


@pytest.mark.parametrize(
    ("arch", "model_class", "small", "large"),
    [  # of the official code of arXiv:2112.13492: at 32 px and 10 classes, and rounded at 64 px and 200 classes
        ("vit", VisionTransformer, 2_692_426, 2.757e6),
        ("cait", Cait, 9_020_618, 9.085e6),
        ("pit", PoolingVisionTransformer, 6_972_586, 7.049e6),
        ("swin", SwinTransformer, 7_073_188, 7.150e6),
        ("t2t", T2TViT, 6_486_080, 6.659e6),
    ],
)
def test_parameters_equal_the_official_code(arch: str, model_class: type, small: int, large: float) -> None:
    model = build(arch)
    assert isinstance(model, model_class)
    assert count_parameters(model) == small
    assert count_parameters(build(arch, 64, num_classes=200)) == pytest.approx(large, abs=500)


T2T_OVERCOUNTED = 64 * (27 - 64) * 32**2 + 64 * (576 - 64) * 16**2
"""Multiply-accumulates that only the published figure counts: the output projection between unfolds as if its input had
the unfolded width, 3·9 and 64·9, instead of 64."""


@pytest.mark.parametrize(
    ("arch", "published", "tolerance"),
    [  # at 64 px; docs/models.md says why CaiT's and PiT's differ
        ("vit", 189.8, 0.0025),
        ("cait", 613.8, 0.03),
        ("pit", 279.2, 0.015),
        ("swin", 242.3, 0.0025),
        ("t2t", 643.0, 0.0025),
    ],
)
def test_macs_equal_the_paper(arch: str, published: float, tolerance: float) -> None:
    macs = count_macs(build(arch, 64, num_classes=200), 3, 64) + (T2T_OVERCOUNTED if arch == "t2t" else 0)
    assert macs / 1e6 == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_parameter_has_a_gradient(arch: str) -> None:
    torch.manual_seed(0)
    model = build(arch, drop_path=0)
    nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([1, 2])).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or p.grad.eq(0).all()]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_models_can_be_pickled(arch: str) -> None:
    model = build(arch, (16, 16)).eval()
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(image), model(image))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_other_image_sizes_are_accepted(arch: str) -> None:
    for size in ((28, 28), (16, 96)):
        with torch.device("meta"):
            model = build(arch, size, num_classes=7, in_chans=1).eval()
            assert model(torch.randn(2, 1, *size)).shape == (2, 7)


def drop_rates(model: nn.Module) -> list[float]:
    return [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]


@pytest.mark.parametrize(("arch", "count"), [("vit", 18), ("cait", 26), ("pit", 24)])
def test_stochastic_depth_is_equal_in_all_blocks(arch: str, count: int) -> None:
    assert drop_rates(build(arch, drop_path=0.3)) == [0.3] * count


@pytest.mark.parametrize("arch", ["swin", "t2t"])
def test_stochastic_depth_grows_with_depth(arch: str) -> None:
    expected = [rate for rate in torch.linspace(0, 0.3, 12)[1:].tolist() for _ in range(2)]
    assert drop_rates(build(arch, drop_path=0.3)) == pytest.approx(expected)


def xavier_std(fan_in: int, fan_out: int) -> float:
    return (2 / (fan_in + fan_out)) ** 0.5


@pytest.mark.parametrize("arch", ["vit", "cait", "pit"])
def test_weights_are_initialized_xavier_normal(arch: str) -> None:
    """Check Xavier-normal weights; the patch embedding of ViT and CaiT is a linear layer in the official code."""
    torch.manual_seed(0)
    model = build(arch)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert module.bias is None or module.bias.eq(0).all(), name
            joint = arch == "cait" and name.rpartition(".")[2] in ("qkv", "k", "v")  # separate layers there
            if module.weight.numel() > 9_000 and not joint:
                patches = name == "patch_embed.proj"
                fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(
                    module.weight.flatten(1) if patches else module.weight
                )
                assert module.weight.std().item() == pytest.approx(xavier_std(fan_in, fan_out), rel=0.03), name
    assert model.pos_embed.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(("img_size", "std"), [(32, 0.0913), (64, 0.0722)])
@pytest.mark.parametrize("arch", ["vit", "cait"])
def test_patch_embedding_is_initialized_as_the_official_linear_layer(arch: str, img_size: int, std: float) -> None:
    """Compare with torch's Xavier initialization of Linear(3 p², 192)."""
    torch.manual_seed(0)
    weight = build(arch, img_size).patch_embed.proj.weight
    assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert xavier_std(3 * (img_size // 8) ** 2, 192) == pytest.approx(std, rel=1e-3)


def test_cait_queries_and_keys_are_initialized_as_separate_layers() -> None:
    """Check the stds of Linear(192, 256) for queries and Linear(192, 512) for keys and values."""
    torch.manual_seed(0)
    model = build("cait")
    parts = [block.attn.qkv.weight.chunk(3) for block in model.blocks]
    parts += [(attn.q.weight, attn.k.weight, attn.v.weight) for attn in (b.attn for b in model.blocks_token_only)]
    for weights in parts:
        stds = [weight.std().item() for weight in weights]
        assert stds == pytest.approx([xavier_std(192, 256), *[xavier_std(192, 512)] * 2], rel=0.03)


def test_swin_has_torchs_initialization() -> None:
    """Check std 1/√(3 fan_in) of all linear weights and biases, those that SPT adds among them."""
    torch.manual_seed(0)
    model = smallvit.create_model("swin", img_size=32, num_classes=10, plugins={"spt": True})
    plain = build("swin")
    for name, module in (*model.named_modules(), *plain.named_modules()):
        if isinstance(module, nn.Linear) and module.weight.numel() > 3_000:
            std = (3 * module.in_features) ** -0.5
            assert module.weight.std().item() == pytest.approx(std, rel=0.05), name
            if module.bias is not None and module.bias.numel() > 100:
                assert module.bias.std().item() == pytest.approx(std, rel=0.25), name
    assert plain.patch_embed.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


def test_t2t_is_initialized_truncated_normal() -> None:
    torch.manual_seed(0)
    for name, module in build("t2t").named_modules():
        if isinstance(module, nn.Linear) and module.weight.numel() > 10_000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.03), name


def test_cait_head_mixing_and_layer_scale_are_initialized_as_in_the_official_code() -> None:
    torch.manual_seed(0)
    model = build("cait")
    layers = [module for module in model.modules() if isinstance(module, TalkingHeads | ClassTalkingHeads)]
    mixes = torch.stack([mix.weight for layer in layers for mix in (layer.proj_l, layer.proj_w)])
    assert mixes.shape == (52, 4, 4)
    assert mixes.std().item() == pytest.approx(1, rel=0.1)
    for gamma in ("gamma_1", "gamma_2"):
        scales = [getattr(block, gamma) for block in (*model.blocks, *model.blocks_token_only)]
        assert [scale.unique().item() for scale in scales] == pytest.approx([0.1] * 18 + [1e-5] * 6 + [0.1] * 2)


def test_class_blocks_normalize_the_class_token_only() -> None:
    """Compare CaiT's class block with x + γ attention([LN(x), patches]) and its MLP, written out."""
    torch.manual_seed(0)
    block = build("cait", drop_path=0).blocks_token_only[0].eval()
    nn.init.normal_(block.norm1.weight)
    x, cls = torch.randn(2, 5, 192), torch.randn(2, 1, 192)
    normal = nn.functional.layer_norm(cls, (192,), block.norm1.weight, block.norm1.bias, block.norm1.eps)
    expected = cls + block.gamma_1 * block.attn(torch.cat([normal, x], dim=1))
    expected = expected + block.gamma_2 * block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x, cls), expected)


def test_class_attention_mixes_heads_and_reads_patches_only() -> None:
    torch.manual_seed(0)
    layer = ClassTalkingHeads(12, num_heads=2, head_dim=5).double()
    x = torch.randn(1, 4, 12, dtype=torch.double)
    q, k, v = layer.q(x[0, :1]), layer.k(x[0, 1:]), layer.v(x[0, 1:])
    scores = [q[:, head] @ k[:, head].T / math.sqrt(5) for head in (slice(5), slice(5, 10))]
    before, after = layer.proj_l.weight, layer.proj_w.weight
    weights = [(before[g, 0] * scores[0] + before[g, 1] * scores[1]).softmax(dim=1) for g in range(2)]
    mixed = [after[g, 0] * weights[0] + after[g, 1] * weights[1] for g in range(2)]
    heads = [mixed[0] @ v[:, :5], mixed[1] @ v[:, 5:]]
    assert torch.allclose(layer(x)[0], layer.proj(torch.cat(heads, dim=1)))


def test_swin_position_embeddings_follow_the_image_size() -> None:
    model = build("swin").eval()
    model.set_input_size(img_size=(48, 32))
    assert model.patch_embed.pos_embed.shape == (1, 24, 16, 96)
    assert model.patch_embed.pos_embed.requires_grad
    assert model(torch.randn(1, 3, 48, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("vit", {"cls_token", "pos_embed"}),
        ("pit", {"cls_token", "pos_embed", "transformers.0.pool.pos_embed"}),
        ("swin", {"patch_embed.pos_embed", "layers.0.blocks.0.attn.relative_position_bias_table"}),
        ("t2t", {"cls_token", "norm.weight"}),
    ],
)
def test_tokens_and_positions_have_no_weight_decay(arch: str, names: set[str]) -> None:
    model = build(arch)
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups
    free = {id(parameter) for group in groups if group["weight_decay"] == 0 for parameter in group["params"]}
    assert {name for name in names if id(model.get_parameter(name)) in free} == names


# T2T


def test_unfold_collects_neighborhoods_with_stride_2() -> None:
    x = torch.randn(1, 2, 5, 4)
    unfolded = Unfold()(x)
    assert unfolded.shape == (1, 18, 3, 2)
    for i, j, channel, row, column in itertools.product(range(3), range(2), range(2), range(3), range(3)):
        y, z = 2 * i + row - 1, 2 * j + column - 1
        inside = 0 <= y < 5 and 0 <= z < 4
        assert unfolded[0, 9 * channel + 3 * row + column, i, j] == (x[0, channel, y, z] if inside else 0)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_token_attention_equals_the_equation(fused: bool) -> None:
    torch.manual_seed(0)
    layer = TokenAttention(7, 4).double()
    layer.fused_attn = fused
    x = torch.randn(2, 5, 7, dtype=torch.double)
    for tokens, result in zip(x, layer(x), strict=True):
        q, k, v = (tokens @ weight.T for weight in layer.qkv.weight.split(4))
        for n in range(5):
            weights = [math.exp(float(q[n] @ k[m]) / math.sqrt(7)) for m in range(5)]
            mean = sum(weight * v[m] for m, weight in enumerate(weights)) / sum(weights)
            assert torch.allclose(result[n], v[n] + layer.proj.weight @ mean + layer.proj.bias)


def test_token_attention_is_scaled_by_the_unfolded_width() -> None:
    """Check 27, 576 and, with SPT, 135 to the power -1/2, which temperatures start at; unpatching restores it."""
    model = smallvit.create_model("t2t", img_size=32, num_classes=10, patch_size=8)
    scales = [27**-0.5, 576**-0.5]
    assert [model.tokens[i].attn.scale for i in range(2)] == pytest.approx(scales)
    smallvit.patch(model, lsa=smallvit.LSAConfig(temperature="fixed"))
    assert [model.tokens[i].attn.scale for i in range(2)] == pytest.approx(scales)
    smallvit.unpatch(model)
    smallvit.patch(model, spt=True, lsa=True)
    temperatures = [model.tokens[i].attn.temperature.item() for i in range(2)]
    assert temperatures == pytest.approx([135**-0.5, scales[1]])
    smallvit.unpatch(model)
    assert [model.tokens[i].attn.scale for i in range(2)] == pytest.approx(scales)


def test_lsa_without_mask_preserves_t2t() -> None:
    torch.manual_seed(0)
    model, image = build("t2t").eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(image)
        smallvit.patch(model, lsa=smallvit.LSAConfig(mask=False))
        torch.testing.assert_close(model(image), before, rtol=1e-4, atol=1e-5)


def test_position_embeddings_are_sines_and_cosines() -> None:
    table = sincos_1d(65, 256)
    for position in (0, 1, 7, 64):
        for channel in (0, 1, 2, 101, 254, 255):
            angle = position / 10_000 ** (2 * (channel // 2) / 256)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert table[0, position, channel].item() == pytest.approx(expected, abs=1e-6)


def test_t2t_accepts_any_image_size() -> None:
    model, wide = build("t2t").eval(), build("t2t", (40, 72)).eval()
    wide.load_state_dict(model.state_dict())
    assert "pos_embed" not in model.state_dict()
    for size in ((40, 72), (24, 20)):
        image = torch.randn(1, 3, *size)
        assert torch.equal(model(image), wide(image))


def test_t2t_reset_classifier() -> None:
    model, image = build("t2t").eval(), torch.randn(2, 3, 32, 32)
    model.reset_classifier(5, global_pool="avg")
    assert model.get_classifier().out_features == model.num_classes == 5
    features = model.forward_features(image)
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 1:].mean(dim=1))
    model.reset_classifier(0)
    assert model(image).shape == (2, model.num_features)


def test_t2t_gradient_checkpointing_keeps_gradients() -> None:
    model, image = build("t2t", drop_path=0), torch.randn(2, 3, 16, 16)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(image).square().sum().backward()
        gradients.append(model.tokens[0].attn.qkv.weight.grad.clone())
    assert torch.equal(*gradients)


def test_t2t_groups_layers_by_depth() -> None:
    model = build("t2t")
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert {"cls_token", "tokens.0.attn.qkv.weight"} <= set(groups[0])
    assert "blocks.11.attn.qkv.weight" in groups[12]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_t2t_has_an_unfold_for_each_halving() -> None:
    for patch_size, tokens in ((2, 256), (4, 64), (8, 16), (16, 4)):
        with torch.device("meta"):
            model = build("t2t", patch_size=patch_size)
            assert 2 ** len(model.tokens) == patch_size
            assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 1 + tokens, 256)
    for patch_size, use in ((1, "use 2"), (6, "use 4 or 8")):
        with pytest.raises(InputError, match=use):
            build("t2t", patch_size=patch_size)


def test_t2t_can_be_created_on_meta_and_loaded() -> None:
    model = build("t2t").eval()
    with torch.device("meta"):
        empty = build("t2t")
    empty.to_empty(device="cpu").eval().load_state_dict(model.state_dict())
    empty.init_non_persistent_buffers()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(empty(image), model(image))


def test_t2t_set_input_size() -> None:
    model = build("t2t").eval()
    image = torch.randn(1, 3, 48, 40)
    expected = model(image)
    smallvit.set_input_size(model, (48, 40))
    assert model.pos_embed.shape[1] == 1 + 12 * 10
    assert torch.equal(model(image), expected)
