"""Test that `smallvit predict`, timm's transform and the exported preprocess.py give the same probabilities."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image, ImageChops, ImageOps
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn

import smallvit as package
from smallvit.datasets.decode import decode_image, resize
from smallvit.evaluation.predict import decode
from smallvit.evaluation.predictor import Predictor, load_predictor
from smallvit.export.verify import render_preprocess
from smallvit.models.checkpoint import save_weights, snapshot
from smallvit.models.factory import create_model

Command = Callable[..., tuple[int, str, str]]
CPU = {"device": "cpu", "amp": "off"}
NAMES = list("abcdefgh")
ORIENTATION = 0x0112
PAGE = Path(__file__).parents[2] / "docs" / "exporting.md"


@torch.no_grad()
def make_sensitive(model: nn.Module, channels: int = 3) -> nn.Module:
    """Change the classifier such that probabilities depend on pixels, and are equal for a mean gray image."""
    model.get_classifier().weight *= 12
    model.get_classifier().bias -= model.eval()(torch.zeros(1, channels, *model.patch_embed.img_size))[0]
    return model


def write_weights(path: Path, channels: int, **entries: object) -> str:
    """Write an untrained model as the weights file of a run."""
    torch.manual_seed(0)
    spec = {"arch": "test_vit", "img_size": 32, "patch_size": 4, "in_chans": channels, "num_classes": len(NAMES)}
    data = {
        "name": "x",
        "class_names": NAMES,
        "mean": [0.48, 0.45, 0.4][:channels],
        "std": [0.2, 0.21, 0.22][:channels],
        **entries,
    }
    save_weights(path, snapshot(make_sensitive(create_model(**spec), channels)), {"model": spec, "data": data})
    return str(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Image.Image]]:
    """Write images of many kinds; return each path, and the RGB image that the file describes."""
    folder, rng, images = tmp_path_factory.mktemp("images"), np.random.default_rng(0), {}

    def save(name: str, image: Image.Image, rgb: np.ndarray | Image.Image | None = None, **options: object) -> None:
        image.save(folder / name, **options)
        described = Image.open(folder / name).convert("RGB") if rgb is None else Image.fromarray(np.asarray(rgb))
        images[name] = str(folder / name), described

    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((4000, 3000))
    coarse = Image.blend(coarse, Image.effect_noise(coarse.size, 120).convert("RGB"), 0.3)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    save("rotated.jpg", coarse, exif=exif, quality=90)
    images["rotated.jpg"] = images["rotated.jpg"][0], images["rotated.jpg"][1].transpose(Image.Transpose.ROTATE_270)
    save("fine.jpg", Image.fromarray(rng.integers(0, 256, (270, 280, 3), dtype=np.uint8)), quality=90)
    noise = rng.integers(0, 256, (60, 90, 4), dtype=np.uint8)
    save("gray.png", Image.fromarray(noise[..., 0]))
    save("gray.jpg", coarse.convert("L").crop((0, 0, 800, 500)))
    deep = rng.integers(0, 2**16, (60, 90)).astype(np.uint16)
    save("deep.png", Image.fromarray(deep), np.repeat((deep / 257).round().astype(np.uint8)[..., None], 3, 2))
    noise[..., :3] //= 2
    alpha = noise[..., 3:] / 255
    save("alpha.png", Image.fromarray(noise), (noise[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8))
    save("palette.png", Image.fromarray(noise[..., :3]).quantize(50))
    save("wide.png", Image.fromarray(rng.integers(0, 256, (40, 300, 3), dtype=np.uint8)))
    save("tall.webp", Image.fromarray(rng.integers(0, 256, (101, 77, 3), dtype=np.uint8)))
    save("tiny.png", Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)))
    return images


def load_module(path: Path) -> ModuleType:
    """Import a file."""
    spec = importlib.util.spec_from_file_location("preprocess", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def probabilities(run: Callable[[Tensor], Tensor], inputs: Tensor | np.ndarray) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(run(torch.as_tensor(np.ascontiguousarray(inputs))))[0].softmax(dim=0)


def by_name(classes: list[tuple[str, float]]) -> Tensor:
    return torch.tensor([probability for _, probability in sorted(classes)], dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_predict_timm_and_preprocess_agree(
    channels: int, images: dict[str, tuple[str, Image.Image]], tmp_path: Path, smallvit: Command
) -> None:
    weights, folder = write_weights(tmp_path / "model.safetensors", channels), tmp_path / "timm"
    assert smallvit("export", weights, "--format", "timm", "--out", folder)[0] == 0
    module = load_module(folder / "preprocess.py")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    paths = [path for path, _ in images.values()]
    from_python = [by_name(each.classes) for each in package.predict(weights, paths, top=8, **CPU)]
    options = ["--format", "jsonl", "--top", "8", "--device", "cpu", "--amp", "off"]
    printed = [json.loads(line) for line in smallvit("predict", weights, *paths, *options)[1].splitlines()]
    for (name, (path, rgb)), own, row in zip(images.items(), from_python, printed, strict=True):
        loaded = module.load_image(path)
        described = rgb if channels == 3 else rgb.convert("L")
        assert loaded.size == rgb.size, name
        difference = np.asarray(ImageChops.difference(loaded, described)).max()
        assert difference <= (name == "alpha.png"), name  # Pillow blends in integers
        by_module = probabilities(model, module.preprocess(path))
        by_timm = probabilities(model, transform(loaded)[None])
        by_command = by_name([(each["name"], each["probability"]) for each in row["classes"]])
        for other in (by_timm, by_command, own):
            torch.testing.assert_close(by_module, other, atol=1e-3, rtol=0, msg=name)
        flipped = module.preprocess(ImageOps.mirror(loaded))  # an image instead of a file
        assert (probabilities(model, flipped) - by_module).abs().max() > 2e-3, name  # the comparison shows something


def test_the_shortcuts_of_decoding_would_be_noticed(images: dict[str, tuple[str, Image.Image]], tmp_path: Path) -> None:
    """Rotation, crop and decoding at full size matter; the snippet in the docs and `predict` once left them out."""
    model = load_predictor(write_weights(tmp_path / "model.safetensors", 3), "predict", **CPU)

    def predicted(pixels: np.ndarray) -> Tensor:
        return model.predict_logits(model.normalize(torch.from_numpy(pixels.copy())[None])).softmax(1)[0]

    path, rgb = images["rotated.jpg"]
    with Image.open(path) as stored:
        wrong = [resize(stored, 32), rgb.resize((32, 32), Image.Resampling.BILINEAR), resize(rgb, 32, crop_pct=0.9)]
    expected = predicted(decode(model, path)[0])
    shifts = [float((predicted(np.asarray(image).transpose(2, 0, 1)) - expected).abs().max()) for image in wrong]
    assert min(shifts) > 5e-3, shifts
    path, rgb = images["fine.jpg"]
    exact = np.asarray(resize(rgb, 32)).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(model, path)[0], exact)
    with Image.open(path) as stored:
        stored.draft("RGB", (32, 32))
        sharp = np.asarray(resize(stored.convert("RGB"), 32)).transpose(2, 0, 1)
    shift, largest = (np.abs(pixels.astype(int) - exact).mean() for pixels in (decode_image(path, 32), sharp))
    assert 0 < shift < largest  # for training: faster, and closer than any fraction of the size would be


def test_every_kind_of_resizing_equals_timms(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = load_predictor(write_weights(tmp_path / "model.safetensors", 3), "predict", **CPU)
    kinds = itertools.product((32, (24, 40)), ("bilinear", "bicubic"), (1.0, 0.9), ("center", "squash", "border"))
    for size, interpolation, crop_pct, crop_mode in kinds:
        if size != 32 and (interpolation, crop_mode) == ("bicubic", "center"):
            continue  # timm 1.0.26 takes bilinear instead
        resizing = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
        (file := tmp_path / "preprocess.py").write_text(
            render_preprocess(replace(model, img_size=size, info=replace(model.info, resizing=resizing)))
        )
        module = load_module(file)
        transform = create_transform(
            (3, *to_2tuple(size)), use_prefetcher=True, mean=(128 / 255,) * 3, **resizing
        )  # the mean is the level of the border
        for width, height in ((300, 40), (40, 300), (5, 7), (32, 32), (67, 33), (33, 32), (101, 97), (1, 90)):
            if width == 1 and (size != 32 or crop_mode == "border"):
                continue  # a thin line: not resized as a whole; timm reduces it to no pixels within a border
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            expected = np.asarray(transform(image)).transpose(1, 2, 0)
            np.testing.assert_array_equal(np.asarray(resize(image, size, **resizing)), expected)
            np.testing.assert_array_equal(np.asarray(module.resize(image)), expected)
    line = Image.fromarray(rng.integers(0, 256, (1, 9000, 3), dtype=np.uint8))  # not resized as a whole
    expected = np.asarray(
        create_transform((3, 32, 32), use_prefetcher=True, interpolation="bilinear", crop_pct=1)(line)
    )
    assert np.abs(np.asarray(resize(line, 32), int).transpose(2, 0, 1) - expected).max() <= 1


def test_weights_of_timm_keep_its_interpolation_and_crop(
    images: dict[str, tuple[str, Image.Image]], tmp_path: Path, smallvit: Command
) -> None:
    torch.manual_seed(0)
    model = make_sensitive(timm.create_model("test_vit", num_classes=8).eval())
    config = resolve_data_config({}, model=model)
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 0.95)
    weights, folder = str(tmp_path / "theirs.safetensors"), tmp_path / "timm"
    save_file(snapshot(model), weights)
    assert smallvit("export", weights, "--arch", "test_vit", "--format", "timm", "--out", folder)[0] == 0
    module, transform = load_module(folder / "preprocess.py"), create_transform(**config)
    predictor = load_predictor(weights, "predict", arch="test_vit", **CPU)
    for path, rgb in (images["rotated.jpg"], images["wide.png"], images["tiny.png"]):
        expected = probabilities(model, transform(rgb)[None])
        torch.testing.assert_close(probabilities(model, module.preprocess(path)), expected, atol=1e-3, rtol=0)
        own = predictor.normalize(torch.from_numpy(decode(predictor, path)[0].copy())[None])
        torch.testing.assert_close(probabilities(model, own), expected, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_programs_run_on_preprocessed_images(
    images: dict[str, tuple[str, Image.Image]],
    tmp_path: Path,
    smallvit: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = write_weights(tmp_path / "model.safetensors", 3)
    for form in ("onnx", "pt2"):  # the second finds the preprocess.py of the first, which is the same
        assert smallvit("export", weights, "--format", form, "--out", tmp_path / f"model.{form}")[0] == 0
    module = load_module(tmp_path / "preprocess.py")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    program = torch.export.load(tmp_path / "model.pt2").module()
    paths = [path for path, _ in images.values()]
    expected = package.predict(weights, paths, top=8, **CPU)
    for path, own in zip(paths, expected, strict=True):
        x = module.preprocess(path)
        for logits in (session.run(["logits"], {"images": x})[0], program(torch.tensor(x)).detach()):
            actual = torch.as_tensor(logits)[0].softmax(dim=0)
            torch.testing.assert_close(actual, by_name(own.classes), atol=1e-3, rtol=0, msg=path)
    (snippet,) = re.findall(r"```python\n(import json, numpy as np, onnxruntime\n.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(Path(paths[0]).read_bytes())
    capsys.readouterr()
    exec(snippet, {})
    name, probability = capsys.readouterr().out.split()
    assert (name, float(probability)) == (expected[0].classes[0][0], pytest.approx(expected[0].classes[0][1], abs=1e-3))


def test_models_trained_on_arrays_read_files_and_arrays_alike(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).integers(60, 120, (40, 50, 3), dtype=np.uint8)
    for channels in (1, 3):
        photo = levels[..., 0] if channels == 1 else levels
        Image.fromarray(photo.copy()).save(tmp_path / "photo.png")
        np.save(tmp_path / "values.npy", values := (photo / 5 + 7).astype(np.float32))
        weights = write_weights(
            tmp_path / f"{channels}.safetensors", channels, gray_ranges={"channels": [[7, 58]] * channels}
        )
        predictor = load_predictor(weights, "predict", **CPU)
        (tmp_path / "preprocess.py").write_text(render_preprocess(predictor))
        module = load_module(tmp_path / "preprocess.py")
        expected, _ = decode(predictor, tmp_path / "photo.png")
        bands = values.reshape(40, 50, channels).transpose(2, 0, 1)
        for image in (tmp_path / "values.npy", values, bands):
            np.testing.assert_array_equal(decode(predictor, image)[0], expected)
            normalized = predictor.normalize(torch.from_numpy(expected.copy())[None])
            torch.testing.assert_close(torch.from_numpy(module.preprocess(image)), normalized)
        with pytest.raises(ValueError, match=f"2 channels, expected {channels}"):
            module.preprocess(np.zeros((9, 9, 2)))


def test_another_preprocess_is_never_lost(tmp_path: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(model: Predictor, path: Path) -> None:
        path.write_text(str(model.img_size))

    monkeypatch.setattr("smallvit.export.export.write_pt2", write)  # exporting takes seconds
    weights = write_weights(tmp_path / "model.safetensors", 3)

    def export(name: str, *options: str) -> tuple[int, str]:
        form = [] if name.endswith("pt2") else ["timm"]
        code, _, err = smallvit("export", weights, "--format", *(form or ["pt2"]), "--out", tmp_path / name, *options)
        return code, err

    file = tmp_path / "preprocess.py"
    for name in ("a.pt2", "b.pt2"):
        assert export(name)[0] == 0
    first = file.read_text()
    code, err = export("c.pt2", "--img-size", "64")
    assert (code, file.read_text(), (tmp_path / "c.pt2").exists()) == (2, first, False)
    assert err == (
        f"smallvit: {file}: belongs to another export; choose another folder with --out, or replace it with "
        "--overwrite\n"
    )
    assert export("c.pt2", "--img-size", "64", "--overwrite")[0] == 0
    assert file.read_text() == re.sub(r"\b32\b", "64", first)
    for name, own in (("a.pt2", file), ("timm", tmp_path / "timm" / "preprocess.py")):
        own.parent.mkdir(exist_ok=True)
        own.write_text("print('mine')")
        code, err = export(name, "--overwrite")
        assert (code, own.read_text()) == (2, "print('mine')")
        assert err.startswith(f"smallvit: {own}: not written by smallvit export; rename it, or choose another folder")
