"""Test CIFAR's ResNets against the paper's description, and the stems of timm's CNNs for small images."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import group_parameters
from torch import Tensor, nn

import smallvit as package
from smallvit import InputError
from smallvit.config.options import OptimConfig
from smallvit.models import small_stems
from smallvit.models.architectures import CIFAR_RESNETS
from smallvit.models.cifar_resnet import ZeroPaddedShortcut
from smallvit.models.factory import create_model, describe_choice
from smallvit.profiling.flops import count_parameters
from smallvit.training.optim import create_optimizer


def build(arch: str = "resnet20", img_size: int = 32, **options: object) -> nn.Module:
    return create_model(arch, **{"img_size": img_size, "num_classes": 10} | options)


def randomize(model: nn.Module) -> nn.Module:
    """Randomize every weight and statistic, so that each has an effect."""
    torch.manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith(("running_var", "bn1.weight", "bn2.weight")):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and "conv" not in name:
            value.normal_(std=0.2)
    return model


# CIFAR's ResNets


def test_parameters_equal_the_published_ones() -> None:
    published = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}  # option A, CIFAR-10
    counts = {}
    for depth in published:
        with torch.device("meta"):
            model = build(f"resnet{depth}")
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        counts[len(layers)] = count_parameters(model)
    assert counts == published


def test_names_are_not_timms() -> None:
    assert not CIFAR_RESNETS.keys() & set(timm.list_models())


def reference(weights: dict[str, Tensor], x: Tensor, training: bool) -> Tensor:
    """Compute section 4.2 of arXiv:1512.03385 layer by layer, with batch norm by its formula."""

    def norm(y: Tensor, name: str) -> Tensor:
        mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        if training:
            mean, variance = y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3), unbiased=False)
        values = (mean, variance, weights[f"{name}.weight"], weights[f"{name}.bias"])
        mean, variance, scale, shift = (value.view(1, -1, 1, 1) for value in values)
        return (y - mean) / (variance + 1e-5).sqrt() * scale + shift

    n = max(int(name.split(".")[1]) for name in weights if name.startswith("layer1")) + 1
    x = norm(F.conv2d(x, weights["conv1.weight"], padding=1), "bn1").relu()
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(n):
            name, halves = f"layer{stage}.{block}", stage > 1 and block == 0
            y = norm(F.conv2d(x, weights[f"{name}.conv1.weight"], stride=1 + halves, padding=1), f"{name}.bn1").relu()
            y = norm(F.conv2d(y, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if halves:
                x, smaller = torch.zeros_like(y), x
                for row, column in torch.cartesian_prod(*map(torch.arange, x.shape[2:])).tolist():
                    x[:, : width // 2, row, column] = smaller[:, :, 2 * row, 2 * column]
            x = (x + y).relu()
    return x.mean(dim=(2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]


@torch.no_grad()
@pytest.mark.parametrize(("training", "size"), [(False, (13, 10)), (True, (8, 8))])
def test_resnet56_equals_the_paper(training: bool, size: tuple[int, int]) -> None:
    model = randomize(build("resnet56").double()).train(training)
    weights, images = copy.deepcopy(model.state_dict()), torch.randn(3, 3, *size, dtype=torch.double)
    assert len({name for name in weights if name.startswith("layer2")}) == 9 * 2 * (1 + 5)
    torch.testing.assert_close(model(images), reference(weights, images, training), rtol=1e-9, atol=1e-9)


def test_shortcuts_subsample_and_pad_channels_with_zeros() -> None:
    x = torch.randn(2, 3, 5, 4)
    y = ZeroPaddedShortcut(3, 7, stride=2)(x)
    assert y.shape == (2, 7, 3, 2)
    assert torch.equal(y[:, :3], x[:, :, [0, 2, 4]][..., [0, 2]])
    assert y[:, 3:].eq(0).all()
    assert not any(isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) for layer in build().modules())


def test_convolutions_are_initialized_he_normal() -> None:
    torch.manual_seed(0)
    for name, layer in build("resnet56").named_modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 4000:
            assert layer.weight.std().item() == pytest.approx((2 / (9 * layer.out_channels)) ** 0.5, rel=0.05), name


def test_any_image_size_is_accepted() -> None:
    model = build(in_chans=1).eval()
    for size in ((1, 1), (8, 8), (33, 20)):
        features = model.forward_features(torch.randn(2, 1, *size))
        assert features.shape == (2, 64, *(-(-side // 4) for side in size))
        assert model.forward_head(features).shape == (2, 10)


def test_stochastic_depth_grows_with_depth_and_is_off_by_default() -> None:
    rates = [layer.drop_prob for layer in build(drop_path_rate=0.4).modules() if isinstance(layer, DropPath)]
    assert rates == pytest.approx([0.4 * index / 8 for index in range(1, 9)])
    for none in ({}, {"drop_path_rate": 0.0, "dropout": 0.0}):
        assert not any(isinstance(layer, DropPath) for layer in build(**none).modules())


def test_reset_classifier() -> None:
    model, images = build().eval(), torch.randn(2, 3, 16, 16)
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features, pre_logits=True), features.mean(dim=(2, 3)))
    model.reset_classifier(5, global_pool="max")
    assert model.get_classifier().out_features == model.num_classes == 5
    assert torch.equal(model(images), model.fc(features.amax(dim=(2, 3))))
    assert not model.get_classifier().training
    model.reset_classifier(0)
    assert torch.equal(model(images), features.amax(dim=(2, 3)))
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(images), features)
    assert model.num_features == model.head_hidden_size == features.shape[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 4}, "--patch-size 4: resnet20 has no patch size to choose"),
        ({"dropout": 0.1}, "--dropout 0.1: resnet20 has no dropout layers"),
        (
            {"plugins": {"spt": True}},
            "--arch resnet20: cannot patch this CIFARResNet with shifted patch tokenization: it has no",
        ),
        (
            {"plugins": {"lsa": True}},
            "--arch resnet20: cannot patch this CIFARResNet with locality self-attention: it has no layer",
        ),
    ],
)
def test_unsupported_options_are_errors(options: dict, message: str) -> None:
    with pytest.raises(InputError) as refused:
        build(**options)
    assert message in str(refused.value)


def test_layer_decay_and_weight_decay() -> None:
    model = build()
    groups = group_parameters(model, model.group_matcher())
    assert {"conv1.weight", "bn1.bias"} <= set(groups[0])
    assert "layer3.2.conv2.weight" in groups[9]
    assert set(group_parameters(model, model.group_matcher(coarse=True))[3]) > {"layer3.0.bn1.weight"}
    optimizer = create_optimizer(model, OptimConfig(opt="momentum", lr=0.1, layer_decay=0.5, weight_decay=1e-4))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            decays = name == "fc.weight" or "conv" in name
            assert group["weight_decay"] == (1e-4 if decays else 0), name
            depth = 10 if name.startswith("fc") else 0
            if name.startswith("layer"):
                depth = 3 * (int(name[5]) - 1) + int(name[7]) + 1
            assert group["lr_scale"] == pytest.approx(0.5 ** (10 - depth)), name


# Stems of timm's CNNs

FAMILIES = (
    *("resnet18", "resnet34", "resnet50", "resnet50d", "wide_resnet50_2", "resnext50_32x4d", "seresnet50"),
    *("efficientnet_b0", "tf_efficientnet_b0", "mobilenetv3_small_100", "regnety_004", "regnetx_002"),
    *("convnext_atto", "convnext_tiny", "densenet121", "vgg11_bn"),
)
STRIDES = {8: 2, 32: 8, 64: 16}
"""Expected stride by image size; 32 in timm."""


def empty(arch: str, img_size: int, **options: object) -> nn.Module:
    try:
        with torch.device("meta"):
            return build(arch, img_size, **options).eval()
    except InputError:  # the RegNets of timm 1.0.26 compute their widths by tensors
        return build(arch, img_size, **options).to("meta").eval()


def check_last_feature_map(archs: tuple[str, ...], img_sizes: tuple[int, ...]) -> None:
    failures = []
    for arch in archs:
        for img_size in img_sizes:
            model, stride = empty(arch, img_size), STRIDES[img_size]
            features = model.forward_features(torch.zeros(2, 3, img_size, img_size, device="meta"))
            measured = (*features.shape[2:], *model.forward_head(features).shape, model.feature_info[-1]["reduction"])
            if measured != (4, 4, 2, 10, stride):
                failures.append((arch, img_size, measured))
    assert not failures


def test_last_feature_map_is_four_wide() -> None:
    check_last_feature_map(("resnet18", "regnety_004", "convnext_atto", "vgg11_bn"), (32,))
    check_last_feature_map(("resnet18",), (8, 64))


@pytest.mark.slow
def test_last_feature_map_is_four_wide_in_all_families() -> None:
    check_last_feature_map(FAMILIES, tuple(STRIDES))


def test_stride_by_image_size() -> None:
    strides = {1: 1, 4: 1, 12: 2, 28: 8, 33: 8, 96: 16, 97: 32, 224: 32}
    for img_size, stride in strides.items():
        plan = small_stems.plan_stem("resnet18", img_size)
        assert (plan.stride if plan else 32) == stride, img_size


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    [
        "resnet18",
        pytest.param("resnet50d", marks=pytest.mark.slow),
        "convnext_atto",
        *(
            pytest.param(arch, marks=pytest.mark.slow)
            for arch in ("mobilenetv3_small_100", "tf_efficientnet_b0", "regnetx_002")
        ),
    ],
)
def test_an_adapted_model_loads_its_weights(arch: str) -> None:
    torch.manual_seed(0)
    model, image = build(arch, 8, in_chans=1).eval(), torch.randn(2, 1, 8, 8)
    small_stems.plan_stem.cache_clear()
    again = build(arch, 8, in_chans=1).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(image)
        assert torch.equal(again(image), expected)
        if arch in ("resnet18", "convnext_atto"):
            assert torch.equal(copy.deepcopy(model)(image), expected)
            assert torch.equal(pickle.loads(pickle.dumps(model))(image), expected)


def test_resnets_become_the_usual_ones_for_cifar() -> None:
    model = empty("resnet18", 32)
    assert count_parameters(model) == 11_173_962  # timm's with a first convolution of 3·3·3·64 instead of 7·7·3·64
    assert count_parameters(empty("resnet50", 32)) == 23_520_842
    conv = model.conv1
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert isinstance(model.maxpool, nn.Identity)
    strides = [layer.stride for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1)]
    assert len(strides) == 6  # a convolution and its shortcut, in three stages


def test_patch_stems_get_smaller_patches() -> None:
    for img_size, size in ((32, 1), (224, 4)):
        stem = empty("convnext_atto", img_size).stem[0]
        assert stem.kernel_size == stem.stride == (size, size)
        assert stem.bias is not None
    shortcut = empty("resnet50d", 8).layer2[0].downsample
    assert isinstance(shortcut[0], nn.Identity)  # an average of 2×2 pixels at its full size


@pytest.mark.parametrize(
    ("arch", "layer", "std"),
    [
        ("resnet18", "conv1", (2 / (9 * 64)) ** 0.5),  # He-normal by fan out
        pytest.param("densenet121", "features.conv0", (2 / (9 * 3)) ** 0.5, marks=pytest.mark.slow),  # by fan in
        pytest.param("convnext_tiny", "stem.0", 0.02, marks=pytest.mark.slow),  # the same in all layers
    ],
)
def test_smaller_kernels_keep_the_initialization(arch: str, layer: str, std: float) -> None:
    torch.manual_seed(0)
    weight = build(arch, 32).get_submodule(layer).weight
    with torch.device("meta"):
        timm_weight = timm.create_model(arch).get_submodule(layer).weight
    assert weight.shape[-1] < timm_weight.shape[-1]
    assert weight.std().item() == pytest.approx(std, rel=0.15)


def shapes(model: nn.Module) -> list[object]:
    layers = [(name, repr(layer)) for name, layer in model.named_modules() if not list(layer.children())]
    return [*layers, *[(name, value.shape) for name, value in model.state_dict().items()]]


@pytest.mark.parametrize(
    "arch",
    [
        "resnet18",
        pytest.param("vgg11_bn", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", marks=pytest.mark.slow),
        "swin_tiny_patch4_window7_224",
    ],
)
def test_without_fit_models_are_timms(arch: str) -> None:
    given = {"img_size": 64} if arch.startswith("swin") else {}
    with torch.device("meta"):
        theirs = timm.create_model(arch, num_classes=10, **given)
    assert shapes(empty(arch, 64, fit=False)) == shapes(theirs)
    assert shapes(empty(arch, 64)) != shapes(theirs)


def test_without_fit_weights_are_timms() -> None:
    models = []
    for create in (lambda: build("resnet18", fit=False), lambda: timm.create_model("resnet18", num_classes=10)):
        torch.manual_seed(0)
        models.append(create().state_dict())
    assert all(map(torch.equal, *(model.values() for model in models)))


def test_without_fit_an_explicit_patch_size_is_used() -> None:
    vit, swin = (
        build(arch, fit=False, patch_size=2) for arch in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")
    )
    assert vit.patch_embed.patch_size == swin.patch_embed.patch_size == (2, 2)
    assert swin.layers[0].blocks[0].window_size == (7, 7)
    assert build("vit_tiny_patch16_224", fit=False).patch_embed.patch_size == (16, 16)
    assert build("vit", fit=False).patch_embed.patch_size == (4, 4)  # ours fit always


@pytest.mark.slow
def test_models_with_other_downsampling_are_unchanged() -> None:
    archs = ("inception_v3", "resnetblur50", "botnet26t_256", "efficientformer_l1", "coatnet_0_224")
    assert [small_stems.plan_stem(arch, 32) for arch in archs] == [None] * len(archs)


def test_changes_are_described() -> None:
    assert describe_choice("resnet18", 32, None) == "resnet18 for 32-pixel images, stride 8 instead of 32"
    assert describe_choice("resnet18", 32, None, fit=False) == "resnet18 for 32-pixel images"
    assert describe_choice("resnet18", 224, None) == "resnet18 for 224-pixel images"
    assert describe_choice("resnet56", 32, None) == "resnet56 for 32-pixel images"


def test_planning_draws_no_random_numbers() -> None:
    """Otherwise initial weights would depend on what the process built before."""
    small_stems.plan_stem.cache_clear()
    before = torch.get_rng_state()
    assert small_stems.plan_stem("resnet18", 32) is not None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("arch", ["vgg11", "resnet18", pytest.param("efficientnet_b0", marks=pytest.mark.slow)])
def test_stochastic_depth_of_0_is_accepted(arch: str) -> None:
    model = empty(arch, 32, drop_path_rate=0.0, dropout=0.0)
    assert all(layer.drop_prob == 0 for layer in model.modules() if isinstance(layer, DropPath))


# Training


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet20", "mobilenetv3_small_050"])
def test_a_cnn_trains_from_the_command_line_and_loads(
    arch: str, smallvit: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    options = ("--recipe", "cnn", "--epochs", 1, "--train-fraction", 0.2, "--out", tmp_path / "run")
    code, out, _ = smallvit("train", "--arch", arch, *options)
    assert code == 0
    assert ("stride 2 instead of 32" in out) == (arch != "resnet20")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    model = package.load_model(tmp_path / "run")
    assert summary["parameters"] == count_parameters(model)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
