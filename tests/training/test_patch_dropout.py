"""Dropping patches in training."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from timm.layers import PatchDropout
from timm.models.vision_transformer import Block

import smallvit
from smallvit import Config, InputError
from smallvit.training.train import train
from tests.sweep import sweep

SHORT = {"arch": "vit96", "epochs": 2, "batch_size": 64, "train_fraction": 0.2, "aug": "none", "amp": "off"}


def run(out: Path, **options: object) -> dict[str, torch.Tensor]:
    train(Config.build(**SHORT | {"device": "cpu", "out": str(out)} | options))
    return smallvit.load_model(out, weights="last").state_dict()


def test_patches_are_dropped_until_the_given_share_of_the_steps_and_never_in_evaluation(tmp_path: Path) -> None:
    seen: list[tuple[bool, int]] = []
    forward = Block.forward

    def record(self: Block, x: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        seen.append((self.training, x.shape[1]))
        return forward(self, x, *arguments, **options)

    with mock.patch.object(Block, "forward", record):
        run(tmp_path / "run", patch_drop_rate=0.5, patch_drop_ratio=0.5, spt=True, lsa=True)
    in_training = [tokens for training, tokens in seen if training]
    half = len(in_training) // 2
    assert set(in_training[:half]) == {1 + 8}  # a class token, and half of 4 x 4 patches
    assert set(in_training[half:]) == {1 + 16}
    assert {tokens for training, tokens in seen if not training} == {1 + 16}


def test_weights_depend_on_the_dropped_patches_and_belong_to_a_plain_model(tmp_path: Path) -> None:
    plain, dropped, again = (
        run(tmp_path / name, patch_drop_rate=rate) for name, rate in (("a", 0.0), ("b", 0.5), ("c", 0.5))
    )
    assert plain.keys() == dropped.keys()
    assert not torch.equal(plain["head.weight"], dropped["head.weight"])
    assert all(map(torch.equal, dropped.values(), again.values()))
    model = smallvit.load_model(tmp_path / "b")
    assert not any(isinstance(module, PatchDropout) for module in model.modules())


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
