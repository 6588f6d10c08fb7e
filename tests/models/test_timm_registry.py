"""Test the models of Lee et al. 2021, created by timm."""

from __future__ import annotations

import pytest
import timm
import torch

from smallvit.models import timm_registry
from smallvit.models.factory import create_model
from smallvit.profiling.flops import count_parameters


def test_timm_lists_every_model_with_and_without_each_plugin() -> None:
    assert set(timm.list_models("smallvit_*")) == {*timm_registry.NAMES, timm_registry.ANY}
    assert len(timm_registry.NAMES) == 20


@pytest.mark.slow
@pytest.mark.parametrize("name", timm_registry.NAMES)
def test_timm_creates_them(name: str) -> None:
    arch, plugins = timm_registry.NAMES[name]
    model = timm.create_model(name, num_classes=7, drop_path_rate=0.2).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert count_parameters(model) == count_parameters(
        create_model("+".join([arch, *plugins]), img_size=32, num_classes=7)
    )
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    assert model.get_submodule(model.pretrained_cfg["classifier"]).out_features == 7


def test_arguments_of_timms_training_script() -> None:
    model = timm.create_model(
        "smallvit_vit_spt_lsa",
        pretrained=False,
        in_chans=1,
        num_classes=5,
        drop_rate=0.0,
        drop_path_rate=None,
        drop_block_rate=None,
        global_pool=None,
        bn_momentum=None,
        bn_eps=None,
        scriptable=False,
        img_size=64,
    )
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 5)


def test_rectangles_are_created_and_dropout_is_refused() -> None:
    model = timm.create_model("smallvit_pit", img_size=(32, 64))
    assert model(torch.zeros(2, 3, 32, 64)).shape == (2, 1000)
    with pytest.raises(ValueError, match="has no dropout"):
        timm.create_model("smallvit_pit", drop_rate=0.1)


def test_pretrained_is_refused() -> None:
    with pytest.raises(ValueError, match="no trained weights"):
        timm.create_model("smallvit_vit", pretrained=True)


def test_any_architecture_is_created_by_its_arguments() -> None:
    arguments = {"arch": "resnet20", "in_chans": 1, "num_classes": 4}
    model = timm.create_model("smallvit_model", img_size=28, drop_path_rate=0.1, **arguments)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 4)
    assert count_parameters(model) == count_parameters(create_model(img_size=28, **arguments))
    assert timm.data.resolve_model_data_config(model)["input_size"] == (1, 28, 28)
