"""Patching timm models in place."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import timm
import torch
from timm.layers import Attention, PatchEmbed
from timm.models.cait import TalkingHeadAttn
from timm.optim import param_groups_weight_decay
from torch import nn

import smallvit
from smallvit.plugins import LSAConfig, SPTConfig
from smallvit.plugins.leaf import replace_module
from smallvit.plugins.lsa_layer import Locality, LocalitySelfAttention
from smallvit.plugins.patch import UnsupportedModelError, unsupported_reason
from smallvit.plugins.spt_layer import ShiftedPatchTokenization

from .sweep import each
from .zoo import build
from .zoo import images as zoo_images

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
MODELS = {
    "vit": lambda **k: timm.create_model("vit_tiny_patch16_224", **{"img_size": 16, "patch_size": 4} | SMALL | k),
    "deit": lambda **k: timm.create_model("deit_tiny_patch16_224", **{"img_size": 16, "patch_size": 4} | SMALL | k),
    "distilled": lambda **k: timm.create_model(
        "deit_tiny_distilled_patch16_224", **{"img_size": 16, "patch_size": 4} | SMALL | k
    ),
    "deit3": lambda **k: timm.create_model("deit3_small_patch16_224", **{"img_size": 16, "patch_size": 4} | SMALL | k),
    "registers": lambda **k: timm.create_model(
        "vit_tiny_patch16_224", **{"img_size": 16, "patch_size": 4, "reg_tokens": 2, "qk_norm": True} | SMALL | k
    ),
    "average pool": lambda **k: timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 16, "patch_size": 4, "global_pool": "avg", "class_token": False} | SMALL | k,
    ),
}


def images(size: tuple[int, int] = (16, 16), chans: int = 3) -> torch.Tensor:
    return torch.randn(2, chans, *size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def test_patch_replaces_the_leaves_and_returns_the_model(model: nn.Module) -> None:
    assert smallvit.patch(model, spt=True, lsa=True) is model
    assert type(model.patch_embed) is PatchEmbed
    assert type(model.patch_embed.proj) is ShiftedPatchTokenization
    assert all(type(block.attn) is LocalitySelfAttention for block in model.blocks)
    logits = model(images())
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@each([{"spt": True}, {"lsa": True}, {"spt": True, "lsa": True}], "plugins")
def test_unpatch_restores_the_model_bit_by_bit(model: nn.Module, plugins: dict) -> None:
    before, keys = model(images()), list(model.state_dict())
    smallvit.patch(model, **plugins)
    assert not torch.equal(model(images()), before)
    assert smallvit.unpatch(model) is model
    assert torch.equal(model(images()), before)
    assert list(model.state_dict()) == keys
    assert all(type(block.attn) is Attention for block in model.blocks)


def test_patching_twice_changes_nothing(model: nn.Module) -> None:
    smallvit.patch(model, spt=True, lsa=True)
    layers = dict(model.named_modules())
    expected = model(images())
    smallvit.patch(model, spt=True, lsa=True)
    assert dict(model.named_modules()) == layers
    assert torch.equal(model(images()), expected)


def test_plugins_that_leave_each_other_no_layer_change_nothing() -> None:
    model = smallvit.patch(MODELS["vit"]().eval(), ffn=True, include="blocks.0.*")
    modules, before = dict(model.named_modules()), model(images())
    with pytest.raises(UnsupportedModelError, match=r"no layer is left for it after binary, ffn, spt$"):
        smallvit.patch(model, spt=True, binary=True, ffn=True, xsa=True)
    assert dict(model.named_modules()) == modules
    assert {change.plugin for change in smallvit.describe(model).changes} == {"ffn"}
    assert torch.equal(model(images()), before)
    smallvit.patch(model, binary=True)
    with pytest.raises(UnsupportedModelError, match="after binary, ffn; give all plugins in the same call"):
        smallvit.patch(model, xsa=True)


def test_plugins_can_be_added_one_after_the_other(model: nn.Module) -> None:
    smallvit.patch(model, spt=True)
    smallvit.patch(model, lsa=True)
    assert {change.plugin for change in smallvit.describe(model).changes} == {"spt", "lsa"}


def test_patched_models_survive_pickle_copy_and_state_dict(model: nn.Module) -> None:
    smallvit.patch(model, spt=True, lsa=True)
    expected = model(images())
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(images()), expected)
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images()), expected)
    smallvit.unpatch(twin)
    assert all(type(block.attn) is Attention for block in twin.blocks)


def test_unpatch_keeps_attention_weights_learned_while_patched() -> None:
    model = smallvit.patch(MODELS["vit"](), lsa=True)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.fill_(0.5)
        model.blocks[1].attn.proj = nn.Linear(24, 24, bias=False)  # replaced by the user
    smallvit.unpatch(model)
    assert model.blocks[0].attn.qkv.weight.eq(0.5).all()
    assert model.blocks[1].attn.proj.bias is None


LOSSES = [
    ({"spt": True}, "patch_embed.proj", "weights they had before"),
    ({"lsa": True}, "blocks.0.attn and 1 more", "the mask of the diagonal"),
    ({"ffn": True}, "blocks.0.mlp and 1 more", "the depthwise convolutions"),
    ({"stem": True}, "patch_embed.proj", "the convolutional stem"),
    ({"xsa": True}, "blocks.0.attn and 1 more", "exclusive self-attention"),
    ({"binary": True}, "blocks.0.attn and 1 more", "one-bit queries, keys, values and attention maps"),
]


@each(LOSSES, "plugins", "names", "loss")
def test_unpatch_names_what_is_lost_or_refuses(plugins: dict, names: str, loss: str) -> None:
    model = smallvit.patch(MODELS["vit"]().eval(), **plugins)
    expected, state = model(images()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"changes the outputs of this VisionTransformer.*{loss}") as refused:
        smallvit.unpatch(model, strict=True)
    assert f", in {names}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert torch.equal(model(images()), expected)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    with pytest.warns(UserWarning, match="unpatching changes") as caught:
        smallvit.unpatch(model)
    assert [str(each.message) for each in caught] == [str(refused.value)]
    assert caught[0].filename == __file__
    assert not torch.allclose(model(images()), expected)


def test_unpatch_warns_once_of_all_that_was_trained_with_preserve() -> None:
    model = smallvit.patch(MODELS["vit"]().eval(), spt=True, lsa=True, ffn=True, init="preserve")
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    smallvit.set_lsa_strength(model, 0.5)
    model(images()).square().sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="unpatching changes") as caught:
        smallvit.unpatch(model)
    assert len(caught) == 1
    for loss in ("the trained weights of the shifted views", "the mask", "the depthwise convolutions"):
        assert loss in str(caught[0].message)
    expected = twin(images())
    torch.testing.assert_close(smallvit.unpatch(twin, strict=True)(images()), expected, rtol=1e-5, atol=1e-5)


@each([LSAConfig(mask=False), LSAConfig(mask=False, temperature="layer"), LSAConfig()], "config")
def test_without_a_mask_unpatching_keeps_the_logits_of_a_trained_model(model: nn.Module, config: LSAConfig) -> None:
    shared_norm = not isinstance(model.blocks[0].attn.q_norm, nn.Identity)  # one norm cannot hold several temperatures
    if shared_norm and config.temperature == "head":
        return
    smallvit.patch(model, lsa=config, init="preserve")
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images()), torch.tensor([0, 1])).backward()
        optimizer.step()
    temperature = model.blocks[0].attn.temperature
    assert (temperature - 8**-0.5).abs().max() > 1e-4
    expected = model(images())
    smallvit.unpatch(model, strict=True)
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)


def test_temperatures_of_layers_that_are_not_plain_are_lost() -> None:
    model = smallvit.patch(MODELS["vit"](), lsa=LSAConfig(mask=False), include="blocks.0.*")
    nn.utils.parametrizations.weight_norm(model.blocks[0].attn.qkv)
    smallvit.unpatch(copy.deepcopy(model), strict=True)
    with torch.no_grad():
        model.blocks[0].attn.temperature.mul_(2)
    with pytest.raises(ValueError, match=r"It loses the learned temperatures, in blocks\.0\.attn\. Keep it patched"):
        smallvit.unpatch(model, strict=True)


def test_temperatures_of_one_bit_layers_become_those_of_full_precision() -> None:
    plain = smallvit.patch(MODELS["vit"]().eval(), lsa=LSAConfig(mask=False))
    with torch.no_grad():
        for block in plain.blocks:
            block.attn.temperature.mul_(torch.tensor([0.5, 1.0, 2.0]))
    model = smallvit.patch(copy.deepcopy(plain), binary=True)
    smallvit.unpatch(model)
    torch.testing.assert_close(model(images()), plain(images()), rtol=1e-5, atol=1e-5)


def test_patch_warns_of_an_optimizer_that_does_not_train_what_is_new() -> None:
    model, other = MODELS["vit"](), MODELS["vit"]()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings(action="error"):
        smallvit.patch(other, spt=True)
        smallvit.patch(model, lsa=LSAConfig(temperature="fixed"), include="blocks.0.*")  # has no parameters
    with pytest.warns(UserWarning, match="optimizer") as caught:
        smallvit.patch(model, spt=True)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(caught[0].message) == (
        "an optimizer of this VisionTransformer was created before patching and does not train its 4 new parameters "
        "(patch_embed.proj.norm.weight and 3 more); create the optimizer after patching"
    )
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert id(model.patch_embed.proj.proj.weight) not in trained
    del optimizer
    gc.collect()
    with warnings.catch_warnings(action="error"):
        smallvit.patch(model, lsa=True, include="blocks.1.*")


def test_only_new_parameters_get_new_names() -> None:
    model = MODELS["vit"]()
    before = set(model.state_dict())
    after = set(smallvit.patch(model, spt=True, lsa=True).state_dict())
    embedding = {f"patch_embed.proj.{layer}.{kind}" for layer in ("norm", "proj") for kind in ("weight", "bias")}
    assert after - before == embedding | {f"blocks.{i}.attn.temperature" for i in range(2)}


def test_temperatures_have_no_weight_decay() -> None:
    model = smallvit.patch(MODELS["vit"](), spt=True, lsa=True)
    decayed = {id(p) for g in param_groups_weight_decay(model, 0.05) if g["weight_decay"] for p in g["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert "patch_embed.proj.proj.weight" in names
    assert not any("temperature" in name or "norm" in name for name in names)


@each([(16, 24), (8, 16)], "size")
@each([1, 3, 5], "chans")
def test_non_square_images_and_any_number_of_channels(size: tuple[int, int], chans: int) -> None:
    model = smallvit.patch(MODELS["distilled"](img_size=size, in_chans=chans), spt=True, lsa=True)
    assert model(images(size, chans)).shape == (2, 5)


@each([1, 2, 8, 16, (2, 8)], "patch")
def test_any_patch_size(patch: int | tuple[int, int]) -> None:
    model = smallvit.patch(MODELS["vit"](patch_size=patch), spt=True, lsa=True)
    assert model(images()).isfinite().all()


def test_dynamic_image_sizes() -> None:
    model = smallvit.patch(MODELS["vit"](dynamic_img_size=True), spt=True, lsa=True)
    assert model(images((24, 32))).shape == (2, 5)


@pytest.mark.slow
def test_patched_models_compile_to_one_graph() -> None:
    model = smallvit.patch(MODELS["distilled"]().eval(), spt=True, lsa=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_describe_tells_what_changed_where_and_at_what_cost() -> None:
    model = MODELS["vit"]()
    plain = sum(parameter.numel() for parameter in model.parameters())
    smallvit.patch(model, spt=True, lsa=True)
    description = smallvit.describe(model)
    assert [change.name for change in description.changes] == ["patch_embed.proj", "blocks.0.attn", "blocks.1.attn"]
    assert description.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert description.added_parameters == description.parameters - plain == 4 * 48 * 24 + 2 * 5 * 48 + 2 * 3
    text = str(description)
    assert "patch_embed.proj" in text
    assert "a token sees 8x8 instead of 4x4" in text
    assert f"{plain:,} without plugins" in text
    assert "not patched: spt, lsa" in str(smallvit.describe(smallvit.unpatch(model)))


@each(["spt", "lsa"], "plugin")
@each(["test_resnet", "test_convnext"], "name")
def test_cnns_are_refused_with_a_reason(name: str, plugin: str) -> None:
    model = timm.create_model(name)
    layers = dict(model.named_modules())
    reason = unsupported_reason(model, plugin)
    assert reason is not None
    with pytest.raises(UnsupportedModelError, match=f"cannot patch this {type(model).__name__} with .*: {reason}"):
        smallvit.patch(model, **{plugin: True})
    assert dict(model.named_modules()) == layers


def test_a_model_that_takes_only_one_of_two_plugins_is_left_unchanged() -> None:
    model = build("levit")
    classes = [type(layer) for layer in model.modules()]
    with pytest.raises(UnsupportedModelError, match="shifted patch tokenization"):
        smallvit.patch(model, spt=True, lsa=True)
    assert [type(layer) for layer in model.modules()] == classes


def test_differential_attention_gets_two_temperatures_a_head() -> None:
    model = MODELS["vit"](attn_layer="diff", embed_dim=48)
    smallvit.patch(model, spt=True, lsa=True)
    assert model.blocks[0].attn.temperature.shape == (6,)


def test_patch_wants_to_know_what_to_patch_and_how() -> None:
    with pytest.raises(ValueError, match="spt=True"):
        smallvit.patch(MODELS["vit"]())
    with pytest.raises(ValueError, match="init 'random': expected paper or preserve"):
        smallvit.patch(MODELS["vit"](), lsa=True, init="random")


def patched_names(model: nn.Module) -> set[str]:
    return {change.name for change in smallvit.describe(model).changes}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"include": "blocks.1.*"}, {"blocks.1.attn"}),
        ({"include": ["blocks.0.attn", "patch_embed*"]}, {"blocks.0.attn", "patch_embed.proj"}),
        ({"include": "*.[0-2].*", "exclude": "blocks.0.attn"}, {"blocks.1.attn", "blocks.2.attn"}),
        ({"exclude": ("blocks.0.*", "blocks.2.*")}, {"blocks.1.attn", "patch_embed.proj"}),
        ({"include": iter(["blocks.2.attn"])}, {"blocks.2.attn"}),
    ],
    ids=("one", "several", "one but another", "all but several", "any iterable"),
)
def test_patterns_choose_the_layers(patterns: dict, expected: set[str]) -> None:
    model = MODELS["vit"](depth=3)
    spt = "patch_embed.proj" in expected
    assert patched_names(smallvit.patch(model, lsa=True, spt=spt, **patterns)) == expected
    assert all(
        (type(block.attn) is Attention) == (f"blocks.{i}.attn" not in expected) for i, block in enumerate(model.blocks)
    )


@pytest.mark.parametrize(
    "patterns", [{"include": "layers.*"}, {"exclude": "*"}, {"include": ()}, {"include": "BLOCKS.*"}]
)
def test_patterns_without_match_list_the_layers(patterns: dict) -> None:
    model = MODELS["vit"](depth=4)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn, blocks\.1\.attn, blocks\.2\.attn, \.\.\."):
        smallvit.patch(model, lsa=True, **patterns)
    with pytest.raises(ValueError, match=r"expected a pattern of patch_embed\.proj$"):
        smallvit.patch(model, spt=True, **patterns)
    assert not patched_names(model)


def test_one_plugin_without_a_layer_keeps_the_other_from_starting() -> None:
    model = MODELS["vit"]()
    with pytest.raises(ValueError, match="locality self-attention"):
        smallvit.patch(model, spt=True, lsa=True, include="patch_embed.*")
    assert not patched_names(model)


def test_patterns_of_layers_that_are_patched_already_change_nothing() -> None:
    model = smallvit.patch(MODELS["vit"](), lsa=True, include="blocks.0.*")
    classes = [type(layer) for layer in model.modules()]
    smallvit.patch(model, lsa=True, include="blocks.0.*")
    assert [type(layer) for layer in model.modules()] == classes
    smallvit.patch(model, lsa=True)
    assert patched_names(model) == {"blocks.0.attn", "blocks.1.attn"}
    smallvit.patch(model, lsa=True, include="blocks.*")
    assert patched_names(model) == {"blocks.0.attn", "blocks.1.attn"}


def test_configs_reach_every_layer() -> None:
    spt, lsa = SPTConfig(directions="all", shift=0.25, norm=False), LSAConfig(temperature="layer", mask=False)
    model = smallvit.patch(build("swin"), spt=spt, lsa=lsa)
    tokenizers = [layer for layer in model.modules() if isinstance(layer, ShiftedPatchTokenization)]
    assert len(tokenizers) == 2
    assert all(layer.config == spt and type(layer.norm) is nn.Identity for layer in tokenizers)
    attentions = [layer for layer in model.modules() if isinstance(layer, Locality)]
    assert len(attentions) == 3
    assert all(layer.temperature.shape == (1,) and not layer.masked for layer in attentions)
    exact = smallvit.patch(build("swin"), spt=spt, init="preserve")
    assert [tuple(p.shape) for n, p in exact.named_parameters() if "shifted" in n] == [
        (12, 8 * 3, 2, 2),
        (24, 8 * 12, 2, 2),
    ]


def test_lsa_strength_without_mask_has_no_effect() -> None:
    model = smallvit.patch(MODELS["vit"](), lsa=LSAConfig(mask=False), init="preserve")
    expected = model(images())
    smallvit.set_lsa_strength(model, 1)
    assert torch.equal(model(images()), expected)


def test_lsa_strength_out_of_range_is_refused() -> None:
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="expected a number from 0 to 1"):
            smallvit.set_lsa_strength(smallvit.patch(MODELS["vit"](), lsa=True, init="preserve"), strength)


def test_describe_tells_of_every_form() -> None:
    text = str(smallvit.describe(smallvit.patch(build("swin"), spt=True, lsa=True)))
    assert "spt  shifted patch tokenization: 3 layers (patch_embed.proj ... layers.1.downsample)" in text
    assert "a token sees 4x4 instead of 2x2" in text
    assert "LayerNorm behind the patches is dropped" in text
    assert "lsa  locality self-attention: 3 layers" in text
    assert "2 temperatures, no token attends to itself" in text
    assert "3 temperatures, no token attends to itself" in text
    text = str(smallvit.describe(smallvit.patch(build("swin v2"), spt=True, lsa=True, init="preserve")))
    assert "shifted views added" in text
    assert "timm's scale, attention of tokens to themselves can be masked gradually (set_lsa_strength)" in text
    one = smallvit.describe(
        smallvit.patch(MODELS["vit"](), lsa=LSAConfig(temperature="layer", mask=False), include="*.0.*")
    )
    assert "1 layer (blocks.0.attn), +1 parameters" in str(one)
    assert "1 temperature, no mask" in str(one)


@each(["paper", "preserve"], "init")
@each(["vit", "cait", "pit distilled", "swin", "swin v2", "swin v2 cr", "pvt v2"], "name")
def test_describe_counts_what_patching_adds(name: str, init: str) -> None:
    plain, model = build(name), build(name)
    description = smallvit.describe(smallvit.patch(model, spt=True, lsa=True, init=init))
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (plain, model)]
    assert description.parameters == sizes[1]
    assert description.added_parameters == sizes[1] - sizes[0]
    assert not smallvit.describe(smallvit.unpatch(model)).changes


@each(["cait", "pit distilled", "swin", "nest", "vit sam", "hiera", "levit"], "name")
def test_temperatures_have_no_weight_decay_in_any_family(name: str) -> None:
    model = smallvit.patch(build(name), lsa=True)
    decayed = {id(p) for g in param_groups_weight_decay(model, 0.05) if g["weight_decay"] for p in g["params"]}
    temperatures = [p for key, p in model.named_parameters() if key.endswith("temperature")]
    assert temperatures
    assert not any(id(parameter) in decayed for parameter in temperatures)


@each(["paper", "preserve"], "init")
@each(["vit", "pit distilled", "swin", "swin v2", "levit"], "name")
def test_patched_models_move_to_another_dtype_and_unpatch_there(name: str, init: str) -> None:
    plain = build(name).double()
    model = build(name)
    smallvit.patch(model, spt=unsupported_reason(model, "spt") is None, lsa=True, init=init)
    model.double()
    x = zoo_images(name).double()
    assert model(x).dtype == torch.float64
    smallvit.unpatch(model)
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float64}
    torch.testing.assert_close(model(x), plain(x))


def test_patching_a_model_in_another_dtype_keeps_it_there() -> None:
    model = smallvit.patch(build("swin").double(), spt=True, lsa=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model(zoo_images("swin").double()).dtype == torch.float64


def test_hooks_on_attention_layers_stay() -> None:
    model, seen = build("cait"), []
    model.blocks[0].attn.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    smallvit.patch(model, lsa=True)
    model(zoo_images("cait"))
    smallvit.unpatch(model)
    model(zoo_images("cait"))
    assert seen == [Locality.adapters[TalkingHeadAttn], TalkingHeadAttn]


def test_training_mode_stays_as_it_is() -> None:
    for training in (True, False):
        model = build("swin").train(training)
        smallvit.patch(model, spt=True, lsa=True)
        assert all(layer.training == training for layer in model.modules())
        smallvit.unpatch(model.train(not training))
        assert all(layer.training != training for layer in model.modules())


@pytest.mark.parametrize(
    ("layer", "plugins"),
    [
        ("blocks.1.attn", {"lsa": True}),
        ("blocks.1.attn", {"spt": True, "lsa": True}),
        ("blocks.0.mlp.fc1", {"binary": True}),
        ("patch_embed.proj", {"spt": True}),
        ("patch_embed.proj", {"spt": True, "init": "preserve"}),
    ],
    ids=str,
)
def test_a_forward_of_the_instance_is_named_before_anything_changes(layer: str, plugins: dict) -> None:
    model = MODELS["vit"]()
    expected, bound = model.eval()(images()), model.get_submodule(layer)
    bound.forward = bound.forward
    with pytest.raises(UnsupportedModelError, match=rf"{layer}: this \w+ instance has its own forward") as error:
        smallvit.patch(model, **plugins)
    assert "\n" not in str(error.value)
    assert not smallvit.describe(model).changes
    assert torch.equal(model(images()), expected)
    del bound.forward
    smallvit.patch(model, **plugins)
    assert layer in [change.name for change in smallvit.describe(model).changes]


def test_layers_with_a_forward_of_the_instance_can_be_excluded_and_are_not_unpatched() -> None:
    model = MODELS["vit"]()
    model.blocks[1].attn.forward = model.blocks[1].attn.forward
    smallvit.patch(model, lsa=True, exclude="blocks.1.*")
    assert [change.name for change in smallvit.describe(model).changes] == ["blocks.0.attn"]
    expected = model.eval()(images())
    model.blocks[0].attn.forward = model.blocks[0].attn.forward
    with pytest.raises(ValueError, match=r"blocks.0.attn: .* instance has its own forward"):
        smallvit.unpatch(model)
    assert torch.equal(model(images()), expected)


def test_a_layer_replaced_by_another_plugin_is_not_counted_as_spt() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    smallvit.patch(model, spt=True)
    before = [change.name for change in smallvit.describe(model).changes]
    replace_module(model, model.blocks[0].norm1, torch.nn.LayerNorm(24), "another")
    assert [change.name for change in smallvit.describe(model).changes] == before
