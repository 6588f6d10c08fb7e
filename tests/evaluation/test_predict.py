"""Test predicting the classes of image files, in several formats."""

from __future__ import annotations

import csv
import errno
import importlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.data import create_transform, resolve_model_data_config

import smallvit as package
from smallvit.cli import main
from smallvit.datasets import decode as _decode
from smallvit.datasets.gray import GrayRanges
from smallvit.evaluation import predict as predicting
from smallvit.evaluation.predict import decode, list_images, predict_images
from smallvit.evaluation.predictor import load_predictor
from smallvit.models.checkpoint import load_weights, save_weights, snapshot

Command = Callable[..., tuple[int, str, str]]
QUICK = ["--epochs", "2", "--batch-size", "32", "--aug", "none", "--device", "cpu", "--amp", "off"]
PIXELS = (load_digits().images * 255 / 16).round().astype(np.uint8)
IGNORED = "ignored: 1 TXT file\n"
HEADER = ["path", "class_1", "probability_1", "class_2", "probability_2"]


@pytest.fixture
def digits(trained_run: Path) -> Path:
    """Return a run on the digits, which are gray."""
    return trained_run


@pytest.fixture(scope="module")
def color(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on three classes of color images; return the run folder."""
    root, rng = tmp_path_factory.mktemp("color"), np.random.default_rng(0)
    for channel, name in enumerate(("red, or so", "green", "blue")):
        (root / "images" / name).mkdir(parents=True)
        for index in range(20):
            pixels = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / "images" / name / f"{index}.png")
    quick = [*QUICK, "--img-size", "16", "--epochs", "4", "--out", str(root / "run")]
    assert main(["train", "--data", str(root / "images"), *quick]) == 0
    return root / "run"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write folders of color images, some hidden, of several sizes and kinds."""
    rng, root = np.random.default_rng(1), tmp_path / "photos"
    for index, name in enumerate(("b.png", "a.jpg", "sub/c.webp", "sub/deeper/d.bmp", ".hidden/e.png", "sub/.f.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + index, 33, 3), dtype=np.uint8)).save(root / name)
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give a text to standard input."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("flip", [False, True])
def test_predictions_are_the_loaded_models_own(color: Path, photos: Path, smallvit: Command, flip: bool) -> None:
    arguments = ["--flip"] if flip else []
    code, out, err = smallvit("predict", color, photos, "--format", "jsonl", *arguments, "--amp", "off")
    assert (code, err) == (0, IGNORED)
    model = package.load_model(color)
    config = resolve_model_data_config(model)
    to_tensor = create_transform(**config)  # timm's own preprocessing, from the run's own metadata
    result = rows(out)
    assert [Path(row["path"]).name for row in result] == ["a.jpg", "b.png", "c.webp", "d.bmp"]
    for row in result:
        with Image.open(row["path"]) as image:
            x = to_tensor(image.convert("RGB"))[None]
        with torch.no_grad():
            predictions = [model(each).softmax(dim=1)[0] for each in ([x, x.flip(-1)] if flip else [x])]
        expected = sum(predictions) / len(predictions)
        order = expected.argsort(descending=True).tolist()
        assert [each["name"] for each in row["classes"]] == [config_names(model)[number] for number in order]
        given = torch.tensor([each["probability"] for each in row["classes"]])
        torch.testing.assert_close(given, expected[order], atol=1e-3, rtol=0)
        assert given.diff().le(0).all()


def config_names(model: torch.nn.Module) -> tuple[str, ...]:
    return model.pretrained_cfg["label_names"]


def test_probabilities_equal_the_softmax_of_the_logits(digits: Path, tmp_path: Path) -> None:
    model = load_predictor(str(digits), "predict", device="cpu", amp="off")
    paths = []
    for index in range(40):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(PIXELS[index]).save(paths[-1])
    mean, std = (package.load_model(digits).pretrained_cfg[name][0] for name in ("mean", "std"))
    with torch.no_grad():
        logits = package.load_model(digits)(torch.tensor((PIXELS[:40, None] / 255 - mean) / std, dtype=torch.float32))
    result = list(predict_images(model, paths, top=20))
    assert [each.path for each in result] == paths
    for each, expected in zip(result, logits.double().softmax(dim=1).tolist(), strict=True):
        assert dict(each.classes) == pytest.approx(dict(zip("0123456789", expected, strict=True)), abs=1e-6)
        probabilities = [probability for _, probability in each.classes]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)


def test_a_folder_a_list_and_standard_input_are_answered_alike(
    color: Path, photos: Path, smallvit: Command, standard_input: Callable[[str], None]
) -> None:
    paths = list_images([str(photos)])
    assert [Path(path).relative_to(photos).as_posix() for path in paths] == [
        "a.jpg",
        "b.png",
        "sub/c.webp",
        "sub/deeper/d.bmp",
    ]
    code, out, err = smallvit("predict", color, photos, "--format", "csv")
    assert err == IGNORED
    predictions = [(code, out, ""), smallvit("predict", color, *paths, "--format", "csv")]
    for given in (["-"], []):
        standard_input("\n".join(paths) + "\r\n\n")
        predictions.append(smallvit("predict", color, *given, "--format", "csv"))
    assert predictions == [predictions[0]] * 4
    assert predictions[0][0] == 0


def test_flags_may_stand_between_the_images(color: Path, photos: Path, smallvit: Command) -> None:
    last = smallvit("predict", color, photos / "a.jpg", photos / "b.png", "--format", "csv")
    assert last[0] == 0
    assert smallvit("predict", color, "--format", "csv", photos / "a.jpg", photos / "b.png") == last
    assert smallvit("predict", color, photos / "a.jpg", "--format", "csv", photos / "b.png") == last


def test_order_is_kept_over_many_batches_and_threads(digits: Path, tmp_path: Path) -> None:
    paths = []
    for index in range(300):
        paths.append(str(tmp_path / f"{index}.png"))
        if index % 7:
            Image.fromarray(PIXELS[index]).save(paths[-1])
    model = load_predictor(str(digits), "predict", device="cpu", amp="off")
    result = list(predict_images(model, paths, top=1))
    assert [each.path for each in result] == paths
    assert [each.error is None for each in result] == [index % 7 > 0 for index in range(300)]
    alone = [next(predict_images(model, [path], top=1)).classes[0][0] for path in paths[1:300:50]]
    assert [each.classes[0][0] for each in result[1:300:50]] == alone


def test_files_that_cannot_be_read_are_named_and_passed_over(color: Path, photos: Path, smallvit: Command) -> None:
    good, broken = photos / "b.png", [photos / f"{name}.png" for name in ("cut", "empty", "missing")]
    broken[0].write_bytes(good.read_bytes()[:500])
    broken[1].touch()
    (photos / "none").mkdir()
    names = [broken[0], good, broken[1], photos / "notes.txt", broken[2], photos / "none"]
    code, out, err = smallvit("predict", color, *names, "--format", "jsonl")
    assert code == 0
    assert err.startswith(f"5 of 6 images cannot be read: {broken[0]} (")
    same = f"{broken[1]}, {photos / 'notes.txt'} (cannot identify image file)"
    assert err.endswith(f"), {same}, {broken[2]} (No such file or directory) and 1 more\n")
    assert len(err.splitlines()) == 1
    result = rows(out)
    assert [row["path"] for row in result] == [str(name) for name in names]
    assert ["classes" in row for row in result] == [False, True, False, False, False, False]
    assert "truncated" in result[0]["error"]
    assert result[4]["error"] == "No such file or directory"
    assert result[5]["error"] == "a folder without images"

    code, out, err = smallvit("predict", color, *names, "--format", "csv")
    assert code == 0
    assert [row[0] for row in csv.reader(out.splitlines())] == ["path", str(good)]


def test_where_nothing_can_be_read_there_is_no_prediction(color: Path, photos: Path, smallvit: Command) -> None:
    out_file = photos / "found.csv"
    code, out, err = smallvit("predict", color, photos / "notes.txt", "--out", out_file)
    assert (code, out) == (2, "")
    assert err == f"smallvit: 1 of 1 images cannot be read: {photos / 'notes.txt'} (cannot identify image file)\n"
    assert not out_file.exists()


@pytest.mark.usefixtures("without_heif")
def test_heic_files_are_named_with_the_remedy(color: Path, photos: Path, smallvit: Command) -> None:
    heic = [photos / f"{name}.heic" for name in "wxyz"]
    for file in heic:
        file.write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic")
    remedy = "(HEIC; to read it: pip install 'smallvit[heif]')\n"
    code, out, err = smallvit("predict", color, heic[0])
    assert (code, out, err) == (2, "", f"smallvit: 1 of 1 images cannot be read: {heic[0]} {remedy}")
    code, out, err = smallvit("predict", color, photos, "--format", "csv")
    assert (code, len(out.splitlines())) == (0, 5)
    first = ", ".join(map(str, heic[:3]))
    assert err == f"{IGNORED}4 of 8 images cannot be read: {first} and 1 more {remedy}"


@pytest.mark.parametrize("name", ["a, b.png", 'say "cheese".png', "two\nlines.png", "größe.png", "a:cat:[b].png"])
def test_names_come_back_from_the_formats_as_they_were(color: Path, photos: Path, smallvit: Command, name: str) -> None:
    (photos / "b.png").rename(photos / name)
    for suffix in ("csv", "jsonl"):
        out_file = photos / f"result.{suffix}"
        code, out, _ = smallvit("predict", color, photos / name, "--out", out_file, "--top", "2")
        assert (code, out) == (0, f"{out_file}\n")
        with open(out_file, newline="", encoding="utf-8") as file:
            if suffix == "jsonl":
                (result,) = map(json.loads, file)
                assert result["path"] == str(photos / name)
                assert len(result["classes"]) == 2
            else:
                header, row = csv.reader(file)
                assert header == HEADER
                assert row[0] == str(photos / name)
                assert {row[1], row[3]} < {"red, or so", "green", "blue"}
    code, out, _ = smallvit("predict", color, photos / name)
    assert code == 0
    assert len(out.splitlines()) == 1


def test_more_classes_than_there_are_give_all(color: Path, photos: Path, smallvit: Command) -> None:
    _, out, _ = smallvit("predict", color, photos / "b.png", "--top", "12", "--format", "csv")
    header, row = csv.reader(out.splitlines())
    assert len(header) == len(row) == 7
    assert sum(map(float, row[2::2])) == pytest.approx(1, abs=1e-5)


def test_gray_models_see_the_very_pixels_of_gray_images(digits: Path, tmp_path: Path) -> None:
    model = load_predictor(str(digits), "predict", device="cpu")
    for index, pixels in enumerate(PIXELS[:20]):
        path = tmp_path / f"{index}.png"
        Image.fromarray(pixels).save(path)
        for image in (path, str(path), pixels, Image.fromarray(pixels)):
            np.testing.assert_array_equal(decode(model, image)[0], pixels[None])


def test_gray_models_take_images_of_any_kind(digits: Path, tmp_path: Path, smallvit: Command) -> None:
    gray = Image.fromarray(PIXELS[0])
    clear = Image.merge("RGBA", [gray, gray, gray, Image.new("L", gray.size, 255)])
    kinds = {"gray": gray, "color": gray.convert("RGB"), "alpha": clear, "palette": gray.convert("P")}
    kinds["deep"] = Image.fromarray(PIXELS[0].astype(np.uint16) * 257)
    for name, image in kinds.items():
        image.save(tmp_path / f"{name}.png")
    _, out, err = smallvit("predict", digits, tmp_path, "--format", "csv", "--top", "10")
    assert err.startswith("1 of 5 images have integer gray values of more than 8 bits: 0 to 65,535 become 0 to 255")
    predictions = [row[1:] for row in csv.reader(out.splitlines())][1:]
    assert predictions == [predictions[0]] * 5


def test_arrays_are_scaled_as_their_files_are(digits: Path, color: Path, tmp_path: Path) -> None:
    for run, shape in ((digits, (9, 9)), (color, (9, 9, 3))):
        model = load_predictor(str(run), "predict", device="cpu")
        values = np.random.default_rng(0).integers(100, 4000, shape, dtype=np.uint16)
        scales = {"png": {"integer": (100.0, 4000.0)}} if values.ndim == 2 else {}
        scales["npy"] = {"channels": ((100.0, 4000.0),) * model.in_chans}
        for suffix, ranges in scales.items():
            file = tmp_path / f"deep.{suffix}"
            np.save(file, values) if suffix == "npy" else Image.fromarray(values).save(file)
            scaled = replace(model, info=replace(model.info, gray_ranges=GrayRanges(**ranges)))
            np.testing.assert_array_equal(decode(scaled, values)[0], decode(scaled, file)[0])
            assert np.ptp(decode(scaled, values)[0]) > 100  # not 0 to 65,535


def test_a_gray_model_sees_the_luma_of_colors(digits: Path) -> None:
    model = load_predictor(str(digits), "predict", device="cpu")
    pixels, _ = decode(model, Image.new("RGB", (9, 9), (200, 100, 50)))
    assert np.unique(pixels).tolist() == [round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)]


def test_predictions_from_python(color: Path, photos: Path) -> None:
    """Files, folders, Pillow images and arrays get the same predictions."""
    file = photos / "b.png"
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    of_file, of_text, of_image, of_array = package.predict(color, [file, str(file), image, np.asarray(image)], top=2)
    assert (of_file.path, of_image.path, of_file.error) == (str(file), "", None)
    assert of_file.classes == of_text.classes == of_image.classes == of_array.classes
    assert len(of_file.classes) == 2
    assert len(package.predict(str(color), image)[0].classes) == 3
    assert [Path(each.path).name for each in package.predict(color, photos)] == ["a.jpg", "b.png", "c.webp", "d.bmp"]
    missing, strange = package.predict(color, ["missing.png", np.zeros((2, 2, 7), np.uint8)])
    assert missing.error == "No such file or directory"
    assert strange.error


def test_a_file_is_replaced_only_when_asked(color: Path, photos: Path, smallvit: Command) -> None:
    out_file = photos / "found.csv"
    out_file.write_text("mine")
    code, _, err = smallvit("predict", color, photos, "--out", out_file)
    assert code == 2
    assert "already exists; choose another name, or add --overwrite" in err
    assert out_file.read_text() == "mine"
    assert smallvit("predict", color, photos, "--out", out_file, "--overwrite")[0] == 0
    assert out_file.read_text().startswith("path,")


def test_an_interruption_leaves_no_half_file(
    color: Path, photos: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_file = photos / "found.jsonl"
    out_file.write_text("before")

    def interrupted(*arguments: object, **options: object) -> Iterator[predicting.Prediction]:
        yield from list(predict_images(*arguments, **options))[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr(predicting, "predict_images", interrupted)
    assert smallvit("predict", color, photos, "--out", out_file, "--overwrite")[0] == 130
    assert out_file.read_text() == "before"
    assert not list(photos.glob(".*.partial"))


def test_weights_that_give_no_finite_logits_are_refused(
    color: Path, photos: Path, tmp_path: Path, smallvit: Command
) -> None:
    weights, metadata = load_weights(color / "best.safetensors")
    weights["head.bias"][:] = torch.nan
    save_weights(tmp_path / "broken.safetensors", weights, metadata)
    code, out, err = smallvit("predict", tmp_path / "broken.safetensors", photos)
    assert (code, out) == (2, "")
    assert "the logits are not finite" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "IMAGES", "--top", "0"], "--top 0: expected at least 1"),
        (["RUN", "IMAGES", "--out", "found.txt"], "expected a name that ends in .csv"),
        (["RUN", "IMAGES", "--out", "found.csv", "--format", "jsonl"], "expected a name that ends in .jsonl"),
        (["RUN", "IMAGES", "--format", "xml"], "invalid choice: 'xml'"),
        (["RUN", "IMAGES", "--tops", "3"], "did you mean '--top'?"),
        (["RUN", "IMAGES", "--arch", "vit"], "remove --arch"),
        (["RUN", "IMAGES", "--img-size", "7"], "--img-size 7"),
        (["runs/none", "IMAGES"], "predict runs/none: no such file or folder"),
        ([], "RUN is missing; use smallvit predict"),
    ],
)
def test_bad_input_gets_one_line(
    color: Path, photos: Path, smallvit: Command, arguments: list[str], message: str
) -> None:
    paths_by_name = {"RUN": color, "IMAGES": photos}
    code, out, err = smallvit("predict", *[paths_by_name.get(argument, argument) for argument in arguments])
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_standard_input_without_names_is_reported(
    color: Path, smallvit: Command, standard_input: Callable[[str], None]
) -> None:
    standard_input("\n")
    code, _, err = smallvit("predict", color)
    assert code == 2
    assert err.startswith(f"smallvit: no images: standard input is empty; use smallvit predict {color} IMAGE ...")


@pytest.mark.parametrize(
    ("stream", "arguments", "line"),
    [
        ("stdin", [], "no images; use smallvit predict RUN IMAGE ..., with files or folders, or - to read names from "),
        ("stdin", ["-"], "no images: standard input is empty; use smallvit predict RUN IMAGE ..."),
        ("stdout", ["IMAGES"], "standard output is closed; add --out FILE"),
    ],
)
def test_closed_standard_streams_are_reported(
    color: Path,
    photos: Path,
    smallvit: Command,
    monkeypatch: pytest.MonkeyPatch,
    stream: str,
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.setattr(f"sys.{stream}", None)
    code, _, err = smallvit("predict", color, *[photos if each == "IMAGES" else each for each in arguments])
    assert code == 2
    assert err.startswith(f"smallvit: {line.replace('RUN', str(color))}")
    assert err.count("\n") == 1


def test_a_file_is_written_though_standard_output_is_closed(
    color: Path, photos: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert smallvit("predict", color, photos, "--out", photos / "found.csv")[0] == 0
    assert (photos / "found.csv").read_text().startswith("path,")


def test_weights_without_a_classifier_are_refused(photos: Path, tmp_path: Path, smallvit: Command) -> None:
    model = timm.create_model("test_vit", num_classes=0)
    save_file(snapshot(model), tmp_path / "features.safetensors")
    code, out, err = smallvit("predict", tmp_path / "features.safetensors", photos, "--arch", "test_vit")
    assert (code, out) == (2, "")
    assert err.endswith(": these weights have no classifier; smallvit probe evaluates their features\n")
    assert len(err.splitlines()) == 1


def test_folders_that_cannot_be_listed_are_named(
    color: Path, photos: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, scandir, real = photos / "sub" / "deeper", os.scandir, _decode.open_image

    def refused(call: Callable[..., object]) -> Callable[..., object]:
        def checked(path: str, *others: object) -> object:
            if Path(path) == locked:
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return call(path, *others)

        return checked

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused(scandir))  # what root is not refused
        patch.setattr(predicting, "open_image", refused(real))
        patch.setattr(predicting, "read_levels", refused(predicting.read_levels))
        code, out, err = smallvit("predict", color, photos, "--format", "csv")
    assert code == 0
    assert len(out.splitlines()) == 4
    assert err == f"{IGNORED}1 of 4 images cannot be read: {locked} (Permission denied)\n"


def test_imagenets_classes_are_shown_in_words(photos: Path, tmp_path: Path, smallvit: Command) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=1000).eval()
    with torch.no_grad():
        model.head.bias[[134, 517, 850]] += 100  # two that are called alike, and one that a part of timm's lists lacks
    spec = {"arch": "test_vit", "img_size": 160, "in_chans": 3, "num_classes": 1000}
    names = timm.data.ImageNetInfo().label_names()
    data = {"name": "imagenet", "class_names": names, "mean": [0.5] * 3, "std": [0.5] * 3}
    save_weights(tmp_path / "model.safetensors", snapshot(model), {"model": spec, "data": data})
    for form in ("table", "csv", "jsonl"):
        _, out, _ = smallvit("predict", tmp_path / "model.safetensors", photos / "b.png", "--format", form)
        for shown in ("crane (n02012849)", "crane (n03126707)", "teddy"):
            assert shown in out
        assert "n04399382" not in out
    assert package.load_model(tmp_path / "model.safetensors").pretrained_cfg["label_names"] == tuple(names)


def test_words_tell_all_of_imagenets_classes_apart() -> None:
    for subset in ("imagenet-1k", "imagenet-22k-ms", "imagenet-21k-goog"):
        info = timm.data.ImageNetInfo(subset)
        shown = predicting.readable_names(info.label_names())
        assert len(set(shown)) == len(shown)
        for word, lemmas in zip(shown, info.label_descriptions(), strict=True):
            assert re.sub(r" \(n\d{8}\)$", "", word) == lemmas.split(",")[0]
    assert predicting.readable_names(["cat", "n99999999"]) == ("cat", "n99999999")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_a_broken_image(
    color: Path, photos: Path, smallvit: Command, value: float
) -> None:
    pixels = np.full((9, 9), 100, np.float32)
    pixels[4, 4] = value
    Image.fromarray(pixels).save(photos / "c.tiff")
    code, _, err = smallvit("predict", color, photos)
    message = "pixels that are infinite or NaN"
    assert (code, err) == (0, f"{IGNORED}1 of 5 images cannot be read: {photos / 'c.tiff'} ({message})\n")


def test_images_are_read_up_to_a_limit(color: Path, photos: Path, smallvit: Command) -> None:
    Image.new("RGB", (200, 100)).save(photos / "large.png")
    arguments = ("predict", color, photos / "large.png", photos / "b.png", "--format", "csv")
    code, out, err = smallvit(*arguments)
    assert (code, len(out.splitlines()), err) == (0, 3, "")
    code, out, err = smallvit(*arguments, "--max-megapixels", 0.01)
    assert (code, len(out.splitlines())) == (0, 2)
    said = "200 x 100 pixels are 0.02 megapixels, --max-megapixels allows 0.01: raise it, or shrink the image"
    assert err == f"1 of 2 images cannot be read: {photos / 'large.png'} ({said})\n"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("FOLDER", "is a folder; choose another name"),
        pytest.param(
            *("/proc/found.csv", "cannot write to /proc"),
            marks=pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a folder that not even root writes to"),
        ),
    ],
)
def test_an_out_that_cannot_be_written_is_refused_before_anything_is_computed(
    photos: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch, out: str, message: str
) -> None:
    (photos / "found.csv").mkdir()
    monkeypatch.setattr("smallvit.evaluation.predictor.read_model_info", None)  # cannot be called
    path = photos / "found.csv" if out == "FOLDER" else Path(out)
    code, _, err = smallvit("predict", "RUN", photos, "--out", path, "--overwrite")
    assert code == 2
    assert err.startswith(f"smallvit: --out {path}: {message}")
    assert len(err.splitlines()) == 1


def test_the_benchmark_prints_its_ratios(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    benchmark = importlib.import_module("predict")
    monkeypatch.setattr(benchmark, "startup", lambda *_: {"a process": 1.0})
    benchmark.main(["--images", "20", "--img-size", "8", "--rounds", "1", "--device", "cpu"])
    printed = capsys.readouterr().out
    for form in ("the model alone", "decoding and the model", "and a CSV file", "a process"):
        assert form in printed
