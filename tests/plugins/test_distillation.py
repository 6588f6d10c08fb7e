"""Distillation tokens: what they add, what they leave, and what inference makes of the two heads."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn

import smallvit
from smallvit.models.architectures import LEE2021
from smallvit.plugins.distillation import add_distillation_token, set_distilled_training
from smallvit.plugins.patch import UnsupportedModelError, patch, unpatch

from .sweep import each

HOLD = ("vit", "pit", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "pit_ti_224", "deit3_small_patch16_224")
NATIVE = ("deit_tiny_distilled_patch16_224", "pit_ti_distilled_224")
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model_of(arch: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    size = {} if arch in LEE2021 else {"depth": (1, 1, 1)} if "pit" in arch else {"depth": 2}
    if not size:
        return smallvit.create_model(arch, img_size=32, num_classes=7, drop_path_rate=0.0, **options)
    patches = {"patch_size": 4, "stride": 4} if "pit" in arch else {"patch_size": 4}
    return timm.create_model(arch, img_size=32, num_classes=7, **size, **patches)


@each(HOLD, "arch")
def test_inference_averages_the_logits_of_the_two_heads(arch: str) -> None:
    model = add_distillation_token(model_of(arch)).eval()
    heads: list[Tensor] = []
    for head in model.get_classifier():
        head.register_forward_hook(lambda layer, inputs, logits: heads.append(logits))
    torch.testing.assert_close(model(X), (heads[0] + heads[1]) / 2)
    assert not torch.allclose(heads[0], heads[1])


@each(["vit", "pit"], "arch")
def test_inference_can_average_probabilities_as_the_paper_has_it(arch: str) -> None:
    model = add_distillation_token(model_of(arch), average="probabilities").eval()
    heads: list[Tensor] = []
    for head in model.get_classifier():
        head.register_forward_hook(lambda layer, inputs, logits: heads.append(logits))
    torch.testing.assert_close(model(X).exp(), (heads[0].softmax(1) + heads[1].softmax(1)) / 2)


@each([*HOLD, *NATIVE], "arch")
@each([False, True], "patched")
def test_training_gives_both_heads_where_that_is_asked_for(arch: str, patched: bool) -> None:
    model = model_of(arch)
    if patched:
        patch(model, spt=True, lsa=True)
    add_distillation_token(model).train()
    assert model(X).shape == (3, 7)
    assert set_distilled_training(model)
    first, second = model(X)
    assert first.shape == second.shape == (3, 7)
    assert model.eval()(X).shape == (3, 7)


@each([("deit_tiny_patch16_224", NATIVE[0]), ("pit_ti_224", NATIVE[1])], "plain", "native")
def test_the_result_is_timms_distilled_model(plain: str, native: str) -> None:
    ours, theirs = add_distillation_token(model_of(plain)).eval(), model_of(native).eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X), theirs(X))
    ours.set_distilled_training(True)
    theirs.set_distilled_training(True)
    torch.testing.assert_close(ours.train()(X), theirs.train()(X))


@each(NATIVE, "arch")
def test_a_model_that_has_a_token_keeps_it(arch: str) -> None:
    model = model_of(arch).eval()
    before, logits = copy.deepcopy(model.state_dict()), model(X)
    twice = add_distillation_token(add_distillation_token(model))
    assert twice.state_dict().keys() == before.keys()
    torch.testing.assert_close(twice(X), logits)


@each(HOLD, "arch")
def test_trained_weights_stay_and_patches_keep_their_positions(arch: str) -> None:
    model = model_of(arch)
    before = copy.deepcopy(model.state_dict())
    after = add_distillation_token(model).state_dict()
    grown = {"cls_token" if "pit" in arch else "pos_embed"}
    for name, value in before.items():
        if name in grown and after[name].shape != value.shape:
            torch.testing.assert_close(torch.cat([after[name][:, :1], after[name][:, 2:]], 1), value)
        else:
            torch.testing.assert_close(after[name], value)


@each(["vit", "pit"], "arch")
def test_a_token_that_none_attends_to_would_change_nothing_else(arch: str) -> None:
    """Without attention to it, the class token's logits are those of the model before."""
    model = model_of(arch).eval()
    logits = model(X)
    heads: list[Tensor] = []
    add_distillation_token(model)
    model.head.register_forward_hook(lambda layer, inputs, actual: heads.append(actual))
    for block in [module for module in model.modules() if type(module).__name__ == "Block"]:
        block.attn.forward = without_second_token(block.attn)
    model(X)
    torch.testing.assert_close(heads[0], logits, rtol=1e-4, atol=1e-5)


def without_second_token(layer: nn.Module):
    plain = layer.forward

    def forward(x: Tensor, *arguments: object, **options: object) -> Tensor:
        kept = plain(torch.cat([x[:, :1], x[:, 2:]], dim=1), *arguments, **options)
        return torch.cat([kept[:, :1], torch.zeros_like(kept[:, :1]), kept[:, 1:]], dim=1)

    return forward


@each(["vit", "pit"], "arch")
def test_models_with_a_token_are_copied_pickled_resized_and_unpatched(arch: str) -> None:
    model = add_distillation_token(model_of(arch, plugins={"spt": True, "lsa": True}), average="probabilities").eval()
    logits = model(X)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(X), logits)
    torch.testing.assert_close(copy.deepcopy(model)(X), logits)
    larger = smallvit.set_input_size(copy.deepcopy(model), 48)
    assert larger(torch.zeros(1, 3, 48, 48)).shape == (1, 7)
    assert unpatch(model)(X).shape == (3, 7)
    model.reset_classifier(4)
    assert model(X).shape == (3, 4)
    assert model.forward_head(model.forward_features(X), pre_logits=True).shape == (3, model.num_features)


@each(["vit", "pit"], "arch")
def test_both_heads_and_the_token_learn(arch: str) -> None:
    model = add_distillation_token(model_of(arch)).train()
    model.set_distilled_training(True)
    first, second = model(X)
    (first.square().sum() + second.square().sum()).backward()
    token = model.cls_token if arch == "pit" else model.dist_token
    for parameter in (token, model.head.weight, model.head_dist.weight):
        assert parameter.grad.abs().sum() > 0
    assert ("cls_token" if arch == "pit" else "dist_token") in model.no_weight_decay()


@pytest.mark.parametrize(
    "arch", ["cait", "swin", "t2t", "resnet18", "vit_base_patch16_siglip_224", "vit_base_patch16_reg4_gap_256"]
)
def test_unsupported_models_are_refused_and_unchanged(arch: str) -> None:
    if arch in LEE2021:
        model = smallvit.create_model(arch, img_size=32, num_classes=7)
    else:
        small = {"depth": 1, "embed_dim": 64, "num_heads": 1} if arch.startswith("vit") else {}
        model = timm.create_model(arch, num_classes=7, **small)
    before = type(model)
    with pytest.raises(UnsupportedModelError, match="takes no distillation token"):
        add_distillation_token(model)
    assert type(model) is before
