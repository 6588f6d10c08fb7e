"""Predicting: the likeliest classes of image files, in several formats."""

from __future__ import annotations

import csv
import errno
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
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
from smallvit import predicting
from smallvit.checkpoint import load_weights, save_weights, snapshot
from smallvit.cli import main
from smallvit.predicting import decode, image_paths, predict
from smallvit.ready import ready

Command = Callable[..., tuple[int, str, str]]
QUICK = ["--epochs", "2", "--batch-size", "32", "--aug", "none", "--device", "cpu", "--amp", "off"]
PIXELS = (load_digits().images * 255 / 16).round().astype(np.uint8)
HEADER = ["path", "class_1", "probability_1", "class_2", "probability_2"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits, which are grey."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", *QUICK, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three classes of colour images."""
    root, rng = tmp_path_factory.mktemp("colour"), np.random.default_rng(0)
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
    """Folders of colour images, some hidden, of several sizes and kinds."""
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
def test_predictions_are_the_loaded_models_own(colour: Path, photos: Path, smallvit: Command, flip: bool) -> None:
    arguments = ["--flip"] if flip else []
    code, out, err = smallvit("predict", colour, photos, "--format", "jsonl", *arguments, "--amp", "off")
    assert (code, err) == (0, "")
    model = package.load(colour)
    config = resolve_model_data_config(model)
    to_tensor = create_transform(**config)  # timm's own preprocessing, from the run's own metadata
    found = rows(out)
    assert [Path(row["path"]).name for row in found] == ["a.jpg", "b.png", "c.webp", "d.bmp"]
    for row in found:
        with Image.open(row["path"]) as image:
            x = to_tensor(image.convert("RGB"))[None]
        with torch.no_grad():
            answers = [model(each).softmax(dim=1)[0] for each in ([x, x.flip(-1)] if flip else [x])]
        expected = sum(answers) / len(answers)
        order = expected.argsort(descending=True).tolist()
        assert [each["name"] for each in row["classes"]] == [config_names(model)[number] for number in order]
        given = torch.tensor([each["probability"] for each in row["classes"]])
        torch.testing.assert_close(given, expected[order], atol=0.01, rtol=0)  # 8-bit rounding after resizing
        assert given.diff().le(0).all()


def config_names(model: torch.nn.Module) -> tuple[str, ...]:
    return model.pretrained_cfg["label_names"]


def test_probabilities_are_those_of_the_logits_to_the_last_digit(digits: Path) -> None:
    model = ready(str(digits), "predict", device="cpu", amp="off")
    paths = []
    for index in range(40):
        paths.append(str(digits.parent / f"{index}.png"))
        Image.fromarray(PIXELS[index]).save(paths[-1])
    mean, std = (package.load(digits).pretrained_cfg[name][0] for name in ("mean", "std"))
    with torch.no_grad():
        logits = package.load(digits)(torch.tensor((PIXELS[:40, None] / 255 - mean) / std, dtype=torch.float32))
    found = list(predict(model, paths, top=20))
    assert [each.path for each in found] == paths
    for each, expected in zip(found, logits.double().softmax(dim=1).tolist(), strict=True):
        assert dict(each.classes) == pytest.approx(dict(zip("0123456789", expected, strict=True)), abs=1e-6)
        probabilities = [probability for _, probability in each.classes]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)


def test_a_folder_a_list_and_standard_input_are_answered_alike(
    colour: Path, photos: Path, smallvit: Command, standard_input: Callable[[str], None]
) -> None:
    paths = image_paths([str(photos)])
    assert [Path(path).relative_to(photos).as_posix() for path in paths] == [
        "a.jpg",
        "b.png",
        "sub/c.webp",
        "sub/deeper/d.bmp",
    ]
    answers = [smallvit("predict", colour, *given, "--format", "csv") for given in ([photos], paths)]
    for given in (["-"], []):
        standard_input("\n".join(paths) + "\r\n\n")
        answers.append(smallvit("predict", colour, *given, "--format", "csv"))
    assert answers == [answers[0]] * 4
    assert answers[0][0] == 0


def test_flags_may_stand_between_the_images(colour: Path, photos: Path, smallvit: Command) -> None:
    last = smallvit("predict", colour, photos / "a.jpg", photos / "b.png", "--format", "csv")
    assert last[0] == 0
    assert smallvit("predict", colour, "--format", "csv", photos / "a.jpg", photos / "b.png") == last
    assert smallvit("predict", colour, photos / "a.jpg", "--format", "csv", photos / "b.png") == last


def test_links_that_lead_back_end(photos: Path) -> None:
    (photos / "sub" / "back").symlink_to(photos)
    assert len(image_paths([str(photos)])) == 4


def test_order_is_kept_over_many_batches_and_threads(digits: Path, tmp_path: Path) -> None:
    paths = []
    for index in range(300):
        paths.append(str(tmp_path / f"{index}.png"))
        if index % 7:
            Image.fromarray(PIXELS[index]).save(paths[-1])
    model = ready(str(digits), "predict", device="cpu", amp="off")
    found = list(predict(model, paths, top=1))
    assert [each.path for each in found] == paths
    assert [each.error is None for each in found] == [index % 7 > 0 for index in range(300)]
    alone = [next(predict(model, [path], top=1)).classes[0][0] for path in paths[1:300:50]]
    assert [each.classes[0][0] for each in found[1:300:50]] == alone


def test_files_that_cannot_be_read_are_named_and_passed_over(colour: Path, photos: Path, smallvit: Command) -> None:
    good, broken = photos / "b.png", [photos / f"{name}.png" for name in ("cut", "empty", "missing")]
    broken[0].write_bytes(good.read_bytes()[:500])
    broken[1].touch()
    (photos / "none").mkdir()
    names = [broken[0], good, broken[1], photos / "notes.txt", broken[2], photos / "none"]
    code, out, err = smallvit("predict", colour, *names, "--format", "jsonl")
    assert code == 0
    assert err.startswith(f"5 of 6 images cannot be read: {broken[0]} (")
    assert err.endswith(" and 2 more\n")
    assert len(err.splitlines()) == 1
    found = rows(out)
    assert [row["path"] for row in found] == [str(name) for name in names]
    assert ["classes" in row for row in found] == [False, True, False, False, False, False]
    assert "truncated" in found[0]["error"]
    assert found[4]["error"] == "No such file or directory"
    assert found[5]["error"] == "a folder without images"

    code, out, err = smallvit("predict", colour, *names, "--format", "csv")
    assert code == 0
    assert [row[0] for row in csv.reader(out.splitlines())] == ["path", str(good)]


def test_where_nothing_can_be_read_there_is_no_answer(colour: Path, photos: Path, smallvit: Command) -> None:
    out_file = photos / "found.csv"
    code, out, err = smallvit("predict", colour, photos / "notes.txt", "--out", out_file)
    assert (code, out) == (2, "")
    assert err == f"smallvit: 1 of 1 images cannot be read: {photos / 'notes.txt'} (cannot identify image file)\n"
    assert not out_file.exists()


@pytest.mark.parametrize("name", ["a, b.png", 'say "cheese".png', "two\nlines.png", "größe.png", "a:cat:[b].png"])
def test_names_come_back_from_the_formats_as_they_were(
    colour: Path, photos: Path, smallvit: Command, name: str
) -> None:
    (photos / "b.png").rename(photos / name)
    for suffix in ("csv", "jsonl"):
        out_file = photos / f"found.{suffix}"
        code, out, _ = smallvit("predict", colour, photos / name, "--out", out_file, "--top", "2")
        assert (code, out) == (0, f"{out_file}\n")
        with open(out_file, newline="", encoding="utf-8") as file:
            if suffix == "jsonl":
                (found,) = map(json.loads, file)
                assert found["path"] == str(photos / name)
                assert len(found["classes"]) == 2
            else:
                header, row = csv.reader(file)
                assert header == HEADER
                assert row[0] == str(photos / name)
                assert {row[1], row[3]} < {"red, or so", "green", "blue"}
    code, out, _ = smallvit("predict", colour, photos / name)
    assert code == 0
    assert len(out.splitlines()) == 1


def test_more_classes_than_there_are_give_all(colour: Path, photos: Path, smallvit: Command) -> None:
    _, out, _ = smallvit("predict", colour, photos / "b.png", "--top", "12", "--format", "csv")
    header, row = csv.reader(out.splitlines())
    assert len(header) == len(row) == 7
    assert sum(map(float, row[2::2])) == pytest.approx(1, abs=1e-5)


def test_grey_models_see_the_very_pixels_of_grey_images(tmp_path: Path) -> None:
    for index, pixels in enumerate(PIXELS[:20]):
        path = tmp_path / f"{index}.png"
        Image.fromarray(pixels).save(path)
        np.testing.assert_array_equal(decode(str(path), 8, 1), pixels[None])


def test_grey_models_take_images_of_any_kind(digits: Path, tmp_path: Path, smallvit: Command) -> None:
    grey = Image.fromarray(PIXELS[0])
    clear = Image.merge("RGBA", [grey, grey, grey, Image.new("L", grey.size, 255)])
    kinds = {"grey": grey, "colour": grey.convert("RGB"), "alpha": clear, "palette": grey.convert("P")}
    kinds["deep"] = Image.fromarray(PIXELS[0].astype(np.uint16) * 257)
    for name, image in kinds.items():
        image.save(tmp_path / f"{name}.png")
    _, out, err = smallvit("predict", digits, tmp_path, "--format", "csv", "--top", "10")
    assert err == ""
    answers = [row[1:] for row in csv.reader(out.splitlines())][1:]
    assert answers == [answers[0]] * 5


def test_a_grey_model_sees_the_luma_of_colours(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), (200, 100, 50)).save(tmp_path / "a.png")
    assert np.unique(decode(str(tmp_path / "a.png"), 8, 1)).tolist() == [round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)]


def test_a_file_is_replaced_only_when_asked(colour: Path, photos: Path, smallvit: Command) -> None:
    out_file = photos / "found.csv"
    out_file.write_text("mine")
    code, _, err = smallvit("predict", colour, photos, "--out", out_file)
    assert code == 2
    assert "exists already; choose another name, or --overwrite" in err
    assert out_file.read_text() == "mine"
    assert smallvit("predict", colour, photos, "--out", out_file, "--overwrite")[0] == 0
    assert out_file.read_text().startswith("path,")


def test_an_interruption_leaves_no_half_file(
    colour: Path, photos: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_file = photos / "found.jsonl"
    out_file.write_text("before")

    def interrupted(*arguments: object, **options: object) -> Iterator[predicting.Prediction]:
        yield from list(predict(*arguments, **options))[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr(predicting, "predict", interrupted)
    assert smallvit("predict", colour, photos, "--out", out_file, "--overwrite")[0] == 130
    assert out_file.read_text() == "before"
    assert not list(photos.glob(".*.partial"))


def test_weights_that_give_no_finite_answer_are_refused(
    colour: Path, photos: Path, tmp_path: Path, smallvit: Command
) -> None:
    weights, metadata = load_weights(colour / "best.safetensors")
    weights["head.bias"][:] = torch.nan
    save_weights(tmp_path / "broken.safetensors", weights, metadata)
    code, out, err = smallvit("predict", tmp_path / "broken.safetensors", photos)
    assert (code, out) == (2, "")
    assert "its answers are not finite" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "IMAGES", "--top", "0"], "--top 0: expected at least 1"),
        (["RUN", "IMAGES", "--out", "found.txt"], "expected a name that ends in .csv or .jsonl"),
        (["RUN", "IMAGES", "--out", "found.csv", "--format", "jsonl"], "they name two formats"),
        (["RUN", "IMAGES", "--format", "xml"], "invalid choice: 'xml'"),
        (["RUN", "IMAGES", "--overwrite"], "--overwrite needs --out FILE"),
        (["RUN", "IMAGES", "--tops", "3"], "did you mean '--top'?"),
        (["RUN", "IMAGES", "--arch", "vit"], "leave --arch out"),
        (["RUN", "IMAGES", "--img-size", "7"], "--img-size 7"),
        (["runs/none", "IMAGES"], "predict runs/none: no such file or folder"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_bad_input_gets_one_line(
    colour: Path, photos: Path, smallvit: Command, arguments: list[str], message: str
) -> None:
    places = {"RUN": colour, "IMAGES": photos}
    code, out, err = smallvit("predict", *[places.get(argument, argument) for argument in arguments])
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_standard_input_without_names_is_told(
    colour: Path, smallvit: Command, standard_input: Callable[[str], None]
) -> None:
    standard_input("\n")
    code, _, err = smallvit("predict", colour)
    assert (code, err) == (2, "smallvit: no images: standard input names none\n")


@pytest.mark.parametrize(
    ("stream", "arguments", "line"),
    [
        ("stdin", [], "no images: give files or folders, or - for names on standard input"),
        ("stdin", ["-"], "no images: standard input names none"),
        ("stdout", ["IMAGES"], "standard output is closed: give --out FILE"),
    ],
)
def test_closed_standard_streams_are_told(
    colour: Path,
    photos: Path,
    smallvit: Command,
    monkeypatch: pytest.MonkeyPatch,
    stream: str,
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.setattr(f"sys.{stream}", None)
    code, _, err = smallvit("predict", colour, *[photos if each == "IMAGES" else each for each in arguments])
    assert (code, err) == (2, f"smallvit: {line}\n")


def test_a_file_is_written_though_standard_output_is_closed(
    colour: Path, photos: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert smallvit("predict", colour, photos, "--out", photos / "found.csv")[0] == 0
    assert (photos / "found.csv").read_text().startswith("path,")


def test_weights_without_a_classifier_are_refused(photos: Path, tmp_path: Path, smallvit: Command) -> None:
    model = timm.create_model("test_vit", num_classes=0)
    save_file(snapshot(model), tmp_path / "features.safetensors")
    code, out, err = smallvit("predict", tmp_path / "features.safetensors", photos, "--arch", "test_vit")
    assert (code, out) == (2, "")
    assert err.endswith(": these weights have no classifier; smallvit probe judges their features\n")
    assert len(err.splitlines()) == 1


def test_folders_that_cannot_be_listed_are_named(
    colour: Path, photos: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, scandir, real = photos / "sub" / "deeper", os.scandir, predicting.decode_image

    def refused(call: Callable[..., object]) -> Callable[..., object]:
        def checked(path: str, *others: object) -> object:
            if Path(path) == locked:
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return call(path, *others)

        return checked

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused(scandir))  # what root is not refused
        patch.setattr(predicting, "decode_image", refused(real))
        code, out, err = smallvit("predict", colour, photos, "--format", "csv")
    assert code == 0
    assert len(out.splitlines()) == 4
    assert err == f"1 of 4 images cannot be read: {locked} (Permission denied)\n"


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
    assert package.load(tmp_path / "model.safetensors").pretrained_cfg["label_names"] == tuple(names)


def test_words_tell_all_of_imagenets_classes_apart() -> None:
    for subset in ("imagenet-1k", "imagenet-22k-ms", "imagenet-21k-goog"):
        info = timm.data.ImageNetInfo(subset)
        shown = predicting.readable(info.label_names())
        assert len(set(shown)) == len(shown)
        for word, lemmas in zip(shown, info.label_descriptions(), strict=True):
            assert re.sub(r" \(n\d{8}\)$", "", word) == lemmas.split(",")[0]
    assert predicting.readable(["cat", "n99999999"]) == ("cat", "n99999999")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_a_broken_image(
    colour: Path, photos: Path, smallvit: Command, value: float
) -> None:
    pixels = np.full((9, 9), 100, np.float32)
    pixels[4, 4] = value
    Image.fromarray(pixels).save(photos / "c.tiff")
    code, _, err = smallvit("predict", colour, photos)
    told = "pixels that are infinite or no numbers"
    assert (code, err) == (0, f"1 of 5 images cannot be read: {photos / 'c.tiff'} ({told})\n")


def test_huge_images_are_named_and_large_ones_read_without_a_warning(photos: Path) -> None:
    Image.new("1", (12_000, 8_000)).save(photos / "large.png")
    Image.new("1", (20_000, 10_000)).save(photos / "huge.png")
    check = (
        "from smallvit.predicting import _decode_some\n"
        f"print([each.error for each in _decode_some({[str(photos / f'{n}.png') for n in ('large', 'huge')]}, 8, 3)])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("[None, 'Image size (200000000 pixels) exceeds limit")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("FOLDER", "a folder; choose another name"),
        pytest.param(
            *("/proc/found.csv", "/proc cannot be written to"),
            marks=pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a folder that not even root writes to"),
        ),
    ],
)
def test_an_out_that_cannot_be_written_is_refused_before_anything_is_computed(
    photos: Path, smallvit: Command, monkeypatch: pytest.MonkeyPatch, out: str, message: str
) -> None:
    (photos / "found.csv").mkdir()
    monkeypatch.setattr("smallvit.ready.described", None)  # cannot be called
    path = photos / "found.csv" if out == "FOLDER" else Path(out)
    code, _, err = smallvit("predict", "RUN", photos, "--out", path, "--overwrite")
    assert code == 2
    assert err.startswith(f"smallvit: --out {path}: {message}")
    assert len(err.splitlines()) == 1


def test_the_benchmark_prints_its_ratios(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    benchmark = importlib.import_module("predict")
    monkeypatch.setattr(benchmark, "startup", lambda *_: {"a process": 1.0})
    benchmark.main(["--images", "20", "--img-size", "8", "--rounds", "1", "--device", "cpu"])
    printed = capsys.readouterr().out
    for form in ("the model alone", "decoding and the model", "and a CSV file", "a process"):
        assert form in printed
