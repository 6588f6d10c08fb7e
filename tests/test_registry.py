"""The paper's models, created by timm."""

from __future__ import annotations

import pytest
import timm
import torch

from smallvit import registry
from smallvit.models import create_model
from smallvit.profile import count_parameters


def test_timm_lists_every_model_with_and_without_each_plugin() -> None:
    assert set(timm.list_models("smallvit_*")) == {*registry.NAMES, registry.ANY}
    assert len(registry.NAMES) == 20


@pytest.mark.parametrize("name", registry.NAMES)
def test_timm_creates_them(name: str) -> None:
    arch, plugins = registry.NAMES[name]
    model = timm.create_model(name, num_classes=7, drop_path_rate=0.2).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert count_parameters(model) == count_parameters(create_model(arch, img_size=32, num_classes=7, **plugins))
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    assert model.get_submodule(model.pretrained_cfg["classifier"]).out_features == 7


def test_what_timms_train_script_passes_is_understood() -> None:
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


@pytest.mark.parametrize("arch", ["vit", "cait", "pit", "swin", "t2t"])
def test_features_only_gives_maps(arch: str) -> None:
    model = timm.create_model(f"smallvit_{arch}_spt_lsa", features_only=True)
    maps = model(torch.zeros(1, 3, 32, 32))
    assert [features.shape[1] for features in maps] == model.feature_info.channels()
    assert all(features.ndim == 4 for features in maps)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"drop_rate": 0.1}, "has no dropout"), ({"img_size": (32, 64)}, "square images")]
)
def test_what_means_nothing_to_them_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("smallvit_pit", **arguments)


def test_there_are_no_trained_weights_to_load() -> None:
    with pytest.raises(ValueError, match="no trained weights"):
        timm.create_model("smallvit_vit", pretrained=True)


def test_any_architecture_is_created_by_its_arguments() -> None:
    arguments = {"arch": "resnet20", "in_chans": 1, "num_classes": 4}
    model = timm.create_model("smallvit_model", img_size=28, drop_path_rate=0.1, **arguments)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 4)
    assert count_parameters(model) == count_parameters(create_model(img_size=28, **arguments))
    assert timm.data.resolve_model_data_config(model)["input_size"] == (1, 28, 28)
