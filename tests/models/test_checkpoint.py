"""Test writing and reading weights files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import smallvit
from smallvit import InputError
from smallvit.models import checkpoint
from smallvit.models.weights_info import FORMAT

SPEC = {"arch": "vit", "img_size": 8, "in_chans": 3, "num_classes": 2, "patch_size": 2}
SPEC["plugins"] = {"spt": {}, "lsa": {}}
DATA = {"name": "x", "class_names": ["a", "b"], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    model = smallvit.create_model(**SPEC).eval()
    path = tmp_path / "best.safetensors"
    checkpoint.save_weights(path, checkpoint.snapshot(model), {"model": SPEC, "data": DATA, "epoch": 1})
    return path, model


def test_load_rebuilds_the_model_from_file_or_folder(saved: tuple[Path, torch.nn.Module]) -> None:
    path, model = saved
    image = torch.randn(2, 3, 8, 8)
    for source in (path, path.parent, str(path)):
        assert torch.equal(smallvit.load_model(source)(image), model(image))


def test_equal_weights_make_equal_bytes(saved: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    path, model = saved
    again = tmp_path / "again"
    checkpoint.save_weights(again, checkpoint.snapshot(model), {"epoch": 1, "data": DATA, "model": SPEC})
    assert again.read_bytes() == path.read_bytes()


def test_timm_finds_the_preprocessing(saved: tuple[Path, torch.nn.Module]) -> None:
    model = smallvit.load_model(saved[0])
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 8, 8)
    assert config["mean"] == (0.1, 0.2, 0.3)
    transform = timm.data.create_transform(**config)
    assert model(transform(Image.new("RGB", (20, 30)))[None]).shape == (1, 2)


def test_damaged_and_foreign_files_are_refused(saved: tuple[Path, torch.nn.Module]) -> None:
    def rewrite(entry: object) -> None:
        save_file(tensors, path, {"smallvit": entry if isinstance(entry, str) else json.dumps(entry)})

    path, content = saved[0], saved[0].read_bytes()
    tensors, _ = checkpoint.load_weights(path)
    known = {"format": FORMAT, "model": SPEC, "data": DATA}
    cases = [
        (lambda: path.unlink(), "no such file"),
        (lambda: path.write_bytes(content[:5000]), "damaged or not a safetensors file"),
        (lambda: path.write_bytes(b""), "damaged"),
        (lambda: path.write_bytes(pickle.dumps({"weights": 1})), "damaged or not a safetensors file"),
        (lambda: save_file({"x": torch.zeros(1)}, path), "not a smallvit checkpoint"),
        (lambda: rewrite("{"), "damaged"),
        (lambda: rewrite([]), "format"),
        (lambda: rewrite({"format": FORMAT + 1}), "format"),
        (lambda: rewrite({"format": FORMAT}), "do not fit"),
        (lambda: rewrite(known | {"model": SPEC | {"no": 1}}), "do not fit"),
        (lambda: rewrite(known | {"model": SPEC | {"plugins": {}}}), "fit"),
        (lambda: rewrite(known | {"model": SPEC | {"arch": "os.system"}}), "no such arch"),
    ]
    for damage, message in cases:
        path.write_bytes(content)
        damage()
        with pytest.raises(InputError, match=message):
            smallvit.load_model(path)


def test_files_are_as_readable_as_others(saved: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert saved[0].stat().st_mode == (tmp_path / "other").stat().st_mode
