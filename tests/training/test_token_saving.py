"""Dropped patches and smaller images in the first part of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import pytest
import torch
from timm.layers import PatchDropout, resample_abs_pos_embed
from timm.models.vision_transformer import Block

import smallvit
from smallvit import Config, InputError
from smallvit.training.token_saving import TokenSaving
from smallvit.training.train import train
from tests.sweep import sweep

SHORT = {"arch": "vit96", "epochs": 2, "batch_size": 64, "train_fraction": 0.2, "aug": "none", "amp": "off"}


def run(out: Path, **options: object) -> dict[str, torch.Tensor]:
    train(Config.build(**SHORT | {"device": "cpu", "out": str(out)} | options))
    return smallvit.load_model(out, weights="last").state_dict()


def record_sizes(call: Callable[..., object], *arguments: object, **options: object) -> list[tuple[bool, int]]:
    """Return whether blocks were in training, and how many tokens they had, in the order of their calls."""
    seen: list[tuple[bool, int]] = []
    forward = Block.forward

    def record(self: Block, x: torch.Tensor, *inputs: object, **more: object) -> torch.Tensor:
        seen.append((self.training, x.shape[1]))
        return forward(self, x, *inputs, **more)

    with mock.patch.object(Block, "forward", record):
        call(*arguments, **options)
    return seen


def test_patches_are_dropped_until_the_given_share_of_the_steps_and_never_in_evaluation(tmp_path: Path) -> None:
    seen = record_sizes(run, tmp_path / "run", patch_drop_rate=0.5, patch_drop_ratio=0.5, spt=True, lsa=True)
    in_training = [tokens for training, tokens in seen if training]
    half = len(in_training) // 2
    assert set(in_training[:half]) == {1 + 8}  # a class token, and half of 4 x 4 patches
    assert set(in_training[half:]) == {1 + 16}
    assert {tokens for training, tokens in seen if not training} == {1 + 16}


def test_images_are_smaller_until_the_given_share_of_the_steps_and_never_in_evaluation(tmp_path: Path) -> None:
    for name, plugins in {"SPT": {"spt": True, "lsa": True}, "stem": {"stem": True, "ffn": True}}.items():
        seen = record_sizes(run, tmp_path / name, progressive_size=4, progressive_ratio=0.5, img_size=8, **plugins)
        in_training = [tokens for training, tokens in seen if training]
        half = len(in_training) // 2
        assert set(in_training[:half]) == {1 + 4}  # a class token, and 2 x 2 patches of 2 pixels
        assert set(in_training[half:]) == {1 + 16}
        assert {tokens for training, tokens in seen if not training} == {1 + 16}


def test_a_small_image_is_what_a_model_of_that_size_sees() -> None:
    config = Config.build(arch="vit96", progressive_size=24)
    options = {"arch": "vit96", "patch_size": 4, "num_classes": 10, "plugins": {"spt": True, "lsa": True}}
    model = smallvit.create_model(img_size=32, **options).eval()
    small = smallvit.create_model(img_size=24, **options).eval()
    weights = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    small.load_state_dict(weights, strict=False)
    positions = resample_abs_pos_embed(model.pos_embed, new_size=(6, 6), old_size=(8, 8), num_prefix_tokens=1)
    small.pos_embed = torch.nn.Parameter(positions.detach())
    saving = TokenSaving(model, config, {"img_size": 32, "plugins": {}})
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    saving.step(0.1)
    shrunk = saving.shrink(images)
    expected = torch.nn.functional.interpolate(images, (24, 24), mode="bilinear", antialias=True)
    torch.testing.assert_close(model(shrunk), small(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(images), before)  # as an evaluation between two steps sees it
    saving.step(0.9)
    assert saving.shrink(images) is images
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


def test_sizes_and_models_that_cannot_be_resized_are_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"arch": "vit96", "progressive_size": 8}, "expected a multiple of the patch size 2 below the image size 8"),
        ({"arch": "vit96", "progressive_size": 5}, "expected a multiple of the patch size 2 below the image size 8"),
        ({"arch": "swin", "progressive_size": 4}, "not for --arch swin"),
    ):
        with pytest.raises(InputError, match=message):
            run(tmp_path / "run", **options)
    run(tmp_path / "cnn", arch="resnet20", progressive_size=6)


def test_the_validation_images_are_evaluated_at_intervals_and_after_the_last_epoch(tmp_path: Path) -> None:
    run(tmp_path / "run", epochs=5, val_interval=2)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["val_top1"] is not None] == [2, 4, 5]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["best_epoch"] in (2, 4, 5)


def test_weights_depend_on_the_dropped_patches_and_belong_to_a_plain_model(tmp_path: Path) -> None:
    plain, dropped, again = (
        run(tmp_path / name, patch_drop_rate=rate) for name, rate in (("a", 0.0), ("b", 0.5), ("c", 0.5))
    )
    assert plain.keys() == dropped.keys()
    assert not torch.equal(plain["head.weight"], dropped["head.weight"])
    assert all(map(torch.equal, dropped.values(), again.values()))
    model = smallvit.load_model(tmp_path / "b")
    assert not any(isinstance(module, PatchDropout) for module in model.modules())


def test_a_resumed_run_gives_the_same_weights(
    tmp_path: Path, interrupted: Callable[[int], AbstractContextManager[None]]
) -> None:
    options = {"epochs": 3, "progressive_size": 4, "patch_drop_rate": 0.25, "val_interval": 2, "spt": True, "lsa": True}
    whole = run(tmp_path / "whole", **options)
    with interrupted(3):
        run(tmp_path / "resumed", **options)
    train(Config.build(resume=str(tmp_path / "resumed")))
    resumed = smallvit.load_model(tmp_path / "resumed", weights="last").state_dict()
    assert all(map(torch.equal, resumed.values(), whole.values()))


@sweep(
    ("options", "named"),
    [
        ({"arch": "vit96", "ffn": True}, "--ffn"),
        ({"arch": "swin"}, "--arch swin"),
        ({"arch": "binaryvit_tiny"}, "--arch binaryvit_tiny"),
        ({"arch": "resnet20"}, "--arch resnet20"),
    ],
)
def test_models_that_need_all_patches_are_refused(options: dict[str, object], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"cannot be combined with {named}, which needs all patches"):
        run(tmp_path / "run", patch_drop_rate=0.25, **options)
    assert not (tmp_path / "run").exists()
