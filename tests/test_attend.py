"""Where models look: the files of `smallvit attend`, and the drawing of heat."""

from __future__ import annotations

import json
import math
import os
import shutil
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import smallvit as package
from smallvit import checkpoint, datasets
from smallvit.attention import attending, examples, gaze, heads, sight
from smallvit.attention.mosaic import BAND, Mosaic
from smallvit.cli import main
from smallvit.options import DataConfig

Command = Callable[..., tuple[int, str, str]]
QUICK = ["--epochs", "2", "--batch-size", "64", "--aug", "none", "--amp", "off", "--device", "cpu"]
PICTURES = ["overview.png", "heads.png", "temperatures.png", "layers-1.png", "layers-2.png", "layers-3.png"]
ON_CPU = ("--amp", "off", "--device", "cpu")
HELD = "holds results already; choose another folder by --out, or replace by --overwrite"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Short runs on the digits: plain, with SPT and LSA, and a CNN."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in (("plain", []), ("plugins", ["--spt", "--lsa"]), ("cnn", ["--arch", "resnet20"])):
        epochs = ["--epochs", "1"] if name == "cnn" else []
        assert main(["train", *QUICK, *epochs, *options, "--out", str(folder / name)]) == 0
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def compared(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is drawn of both transformers."""
    out = tmp_path_factory.mktemp("looks") / "both"
    names = [str(runs["plugins"]), "--compare", str(runs["plain"])]
    assert main(["attend", *names, "--count", "3", "--out", str(out), *ON_CPU]) == 0
    return out


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of a model whose keys are of fewer places than its queries."""
    run = tmp_path_factory.mktemp("binary") / "run"
    short = ["--epochs", "1", "--train-fraction", "0.2", "--batch-size", "64", *ON_CPU]
    assert main(["train", "--recipe", "binaryvit", "--data", "digits", *short, "--out", str(run)]) == 0
    return run


def figures(folder: Path) -> dict:
    return json.loads((folder / "attention.json").read_text())


def test_pictures_are_there_and_hold_something(compared: Path) -> None:
    assert sorted(path.name for path in compared.iterdir()) == sorted([*PICTURES, "attention.json"])
    for name in PICTURES:
        with Image.open(compared / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(2**24)) > 50


def test_figures_are_possible_ones(compared: Path) -> None:
    for record in (figures(compared), figures(compared)["compared"]):
        assert [layer["layer"] for layer in record["layers"]] == [f"blocks.{depth}.attn" for depth in range(6)]
        for layer in record["layers"]:
            assert (layer["grid"], layer["keys"], layer["heads"]) == ([4, 4], 17, 6)
            assert len(layer["entropy"]) == len(layer["distance"]) == 6
            assert all(0 < entropy <= math.log(17) for entropy in layer["entropy"])
            assert all(0 < distance < 8 * math.sqrt(2) for distance in layer["distance"])


def test_even_attention_has_the_mean_distance_between_tokens(compared: Path) -> None:
    centres = np.array([(2 * row + 1, 2 * column + 1) for row in range(4) for column in range(4)])
    mean = np.linalg.norm(centres[:, None] - centres[None], axis=2).mean()
    plain, masked = figures(compared)["compared"]["layers"], figures(compared)["layers"]
    assert [layer["even_distance"] for layer in plain] == pytest.approx([mean] * 6)
    assert [layer["even_entropy"] for layer in plain] == pytest.approx([math.log(17)] * 6)
    assert [layer["even_distance"] for layer in masked] == pytest.approx([mean * 16 / 15] * 6)  # not to itself
    assert [layer["even_entropy"] for layer in masked] == pytest.approx([math.log(16)] * 6)


def test_temperatures_are_those_of_the_weights_and_none_without_plugins(compared: Path, runs: dict[str, Path]) -> None:
    weights, _ = checkpoint.load_weights(runs["plugins"] / "best.safetensors")
    for layer in figures(compared)["layers"]:
        assert layer["temperature"] == weights[f"{layer['layer']}.temperature"].tolist()
        assert layer["initial_temperature"] == pytest.approx((96 // 6) ** -0.5)
    assert all(layer["temperature"] is None for layer in figures(compared)["compared"]["layers"])


def test_answers_are_the_models_own(compared: Path, runs: dict[str, Path]) -> None:
    dataset = datasets.load(DataConfig())
    model = package.load(runs["plugins"])
    mean, std = dataset.statistics(torch.device("cpu"))
    for image in figures(compared)["images"]:
        data, split, index = image["source"].split()
        assert (data, split) == ("digits", "test")
        with torch.no_grad():
            shares = model((dataset.test.pixels[[int(index)]] / 255 - mean) / std).softmax(dim=1)[0]
        assert image["predicted"] == str(int(shares.argmax()))
        assert image["probability"] == pytest.approx(float(shares.max()), abs=1e-5)
        assert image["label"] == str(int(dataset.test.labels[int(index)]))


def test_the_record_says_what_it_rests_on(compared: Path, runs: dict[str, Path]) -> None:
    record = figures(compared)
    assert record["weights_sha256"] != record["compared"]["weights_sha256"]
    assert (record["name"], record["img_size"], record["precision"]) == (str(runs["plugins"]), 8, "fp32")
    assert record["command"].startswith("smallvit attend ")
    assert (record["data"], record["split"]) == ("digits", "test")
    assert {"hardware", "versions", "git_revision"} < set(record)


def test_without_temperatures_none_are_drawn_and_old_files_go(
    compared: Path, runs: dict[str, Path], smallvit: Command, tmp_path: Path
) -> None:
    for name in PICTURES:
        (tmp_path / name).write_bytes((compared / name).read_bytes())
    mine = {"mine.txt", "layers-mine.png", "layers-1.png.png"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    arguments = ("attend", runs["plain"], "--count", 1, "--out", tmp_path, *ON_CPU)
    code, _, err = smallvit(*arguments)
    assert (code, err) == (2, f"smallvit: {tmp_path}: {HELD}\n")
    code, out, _ = smallvit(*arguments, "--overwrite")
    assert code == 0
    there = {"overview.png", "heads.png", "layers-1.png", "attention.json"}
    assert {path.name for path in tmp_path.iterdir()} == there | mine
    assert {Path(line).name for line in out.splitlines() if line.startswith(str(tmp_path))} == there


def test_a_runs_own_folder_is_the_default(runs: dict[str, Path], smallvit: Command) -> None:
    assert smallvit("attend", runs["plain"], "--count", 1, *ON_CPU)[0] == 0
    assert (runs["plain"] / "attend" / "attention.json").exists()
    code, _, err = smallvit("attend", runs["plain"], "--count", 1, *ON_CPU)
    assert code == 2
    assert HELD in err


def test_keys_of_fewer_places_are_drawn_over_their_own_grid(binary: Path, smallvit: Command, tmp_path: Path) -> None:
    code, out, err = smallvit("attend", binary, "--count", 2, "--out", tmp_path / "looks", *ON_CPU)
    assert code == 0, err
    assert "4 × 4" in out
    layers = figures(tmp_path / "looks")["layers"]
    assert [layer["grid"][0] for layer in layers] == [4, 4, 4, 4, 2, 2, 2, 2, 1, 1]
    assert [layer["keys"] for layer in layers] == [layer["grid"][0] ** 2 for layer in layers]
    tokens, keys = (np.arange(count) * 8 / count + 4 / count for count in (8, 4))
    down, right = np.meshgrid(tokens, tokens), np.meshgrid(keys, keys)
    apart = np.hypot(*(one.reshape(-1, 1) - other.reshape(1, -1) for one, other in zip(down, right, strict=True)))
    assert layers[0]["even_distance"] == pytest.approx(apart.mean())
    assert layers[-1]["entropy"] == [0.0] * 8  # there is one token
    with Image.open(tmp_path / "looks" / "overview.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 50


def test_the_page_of_a_binary_run_shows_where_it_looks(binary: Path, smallvit: Command, tmp_path: Path) -> None:
    code, _, err = smallvit("report", binary, "--out", tmp_path / "page.html", "--device", "cpu")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Where it looks" in page
    assert "Attention maps are missing" not in page


def test_image_files_are_shown_and_broken_ones_left_out(
    runs: dict[str, Path], smallvit: Command, tmp_path: Path, write_images: Callable[..., list[Path]]
) -> None:
    first, second = write_images(tmp_path / "images", 2, size=(20, 12))
    (broken := tmp_path / "images" / "broken.png").write_text("no image")
    out = tmp_path / "looks"
    code, _, err = smallvit("attend", runs["plugins"], first, "--out", out, broken, second, *ON_CPU)
    assert code == 0
    assert f"left out: {broken} (cannot identify image file" in " ".join(err.split())
    images = figures(out)["images"]
    assert [(image["source"], image["label"]) for image in images] == [(str(first), None), (str(second), None)]
    assert not (out / "layers-3.png").exists()


def test_relevance_may_be_for_the_true_class(runs: dict[str, Path], smallvit: Command, tmp_path: Path) -> None:
    seen = {}
    for kind in ("predicted", "label"):
        options = ("--count", 5, "--split", "train", "--classes-of", kind, "--out", tmp_path / kind)
        assert smallvit("attend", runs["plugins"], *options, *ON_CPU)[0] == 0
        assert figures(tmp_path / kind)["classes_of"] == kind
        seen[kind] = (tmp_path / kind / "overview.png").read_bytes()
    assert any(image["predicted"] != image["label"] for image in figures(tmp_path / "label")["images"])
    assert seen["predicted"] != seen["label"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["CNN"], "has no attention"),
        (["RUN", "none.png"], "none.png: no such image"),
        (["RUN", "FOLDER"], "a folder, not an image"),
        (["RUN", "BROKEN"], "none of the images can be decoded"),
        (["RUN", "--split", "tset"], "did you mean 'test'?"),
        (["RUN", "--count", "0"], "--count 0: expected at least 1"),
        (["RUN", "--layers", "0"], "--layers 0: expected at least 1"),
        (["RUN", "--classes-of", "lable"], "did you mean 'label'?"),
        (["RUN", "IMAGE", "--classes-of", "label"], "nothing says the classes of image files"),
        (["RUN", "--compare", "RUN"], "the same model; name another"),
        (["RUN", "--compare", "RUN/best.safetensors"], "the same model; name another"),
        (["RUN", "--compare", "WEIGHTS"], "the same model; name another"),
        (["RUN", "IMAGE", "--count", "1"], "--count: image files are given"),
        (["RUN", "IMAGE", "--split", "val"], "--split: image files are given"),
        (["RUN", "IMAGE", "--data", "digits"], "--data: image files are given"),
        (["RUN", "IMAGE", "--split-seed", "1"], "--split-seed: image files are given"),
        (["RUN", "--compare", "runs/none"], "--compare runs/none: no such file or folder"),
        (["RUN", "--split-seed", "1"], "give the same here (--split-seed 0)"),
        (["RUN", "--data", "FOLDER"], "takes images of 1 channels"),
        (["WEIGHTS"], "give --data"),
        (["runs/none"], "runs/none: no such file or folder"),
        (["RUN", "--epochs", "3"], "--epochs"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(
    runs: dict[str, Path], image_folder: Path, smallvit: Command, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "broken.png").write_text("no image")
    (tmp_path / "alone.safetensors").write_bytes((runs["plain"] / "best.safetensors").read_bytes())
    places = {"RUN": runs["plain"], "CNN": runs["cnn"], "FOLDER": image_folder, "BROKEN": tmp_path / "broken.png"}
    places |= {"RUN/best.safetensors": runs["plain"] / "best.safetensors"}
    places |= {"WEIGHTS": tmp_path / "alone.safetensors", "IMAGE": image_folder / "dark" / "000.png"}
    out = tmp_path / "looks"
    code, _, err = smallvit("attend", *[places.get(each, each) for each in arguments], "--out", out, *ON_CPU)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert sum(line.startswith("smallvit:") for line in err.splitlines()) == 1
    assert not out.exists()


def test_weights_of_no_run_need_a_place_for_the_files(runs: dict[str, Path], smallvit: Command, tmp_path: Path) -> None:
    file = runs["plain"] / "best.safetensors"
    assert "give --out DIR" in smallvit("attend", file, *ON_CPU)[2]
    assert smallvit("attend", file, "--count", 1, "--out", tmp_path / "looks", *ON_CPU)[0] == 0


def test_an_interruption_leaves_no_half_written_file(
    runs: dict[str, Path], smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (there := tmp_path / "there").mkdir()
    (there / "attention.json").write_text("{}")
    (there / "overview.png").write_text("old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", interrupt)
    for out in (tmp_path / "looks", there):
        arguments = ("attend", runs["plain"], "--count", 1, "--out", out, "--overwrite", *ON_CPU)
        assert smallvit(*arguments)[0] == 130
    assert not (tmp_path / "looks").exists()
    assert {path.name: path.read_text() for path in there.iterdir()} == {"attention.json": "{}", "overview.png": "old"}


def test_temperatures_without_a_course_are_drawn_alone(compared: Path, tmp_path: Path) -> None:
    layers = figures(compared)["layers"]
    course = [{"epoch": 1, "temperatures": {layer["layer"]: layer["temperature"] for layer in layers}}]
    wide = []
    for lines in ([], course):
        assert heads.draw_temperatures({"run": layers}, {"run": lines}, tmp_path / "drawn.png")
        with Image.open(tmp_path / "drawn.png") as picture:
            wide.append(picture.width)
    assert wide[1] > 1.5 * wide[0]


def test_of_a_course_that_lacks_a_layer_the_others_are_drawn(compared: Path, tmp_path: Path) -> None:
    layers = figures(compared)["layers"]
    whole = {layer["layer"]: layer["temperature"] for layer in layers}
    course = [{"epoch": 1, "temperatures": {layers[1]["layer"]: whole[layers[1]["layer"]]}}]
    assert heads.draw_temperatures(
        {"run": layers}, {"run": [*course, {"epoch": 2, "temperatures": whole}]}, tmp_path / "a.png"
    )


def test_as_many_images_are_looked_at_together_as_their_maps_leave_room(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, at_once, alive = {}, set(), []
    record, relevance = sight.attention.record, sight.relevance

    def recorded(model: object, images: torch.Tensor) -> object:
        logits, maps = record(model, images)
        at_once.add(len(images))
        alive.extend(weakref.ref(each) for each in maps)
        return logits, maps

    def relevant(*arguments: object) -> object:
        assert not any(each() is not None for each in alive)
        return relevance(*arguments)

    monkeypatch.setattr(sight.attention, "record", recorded)
    monkeypatch.setattr(sight, "relevance", relevant)
    of_one = 4 * 6 * 6 * 17**2  # layers, heads, tokens
    for memory in (2**29, sight.COPIES * 2 * of_one):
        at_once.clear()
        monkeypatch.setattr(sight, "MEMORY", memory)
        out = tmp_path / str(memory)
        assert main(["attend", str(runs["plain"]), "--count", "5", "--out", str(out), *ON_CPU]) == 0
        seen[memory] = figures(out), max(at_once)
    (one, most), (two, pair) = seen.values()
    assert (most, pair) == (5, 2)
    for a, b in zip(one["layers"], two["layers"], strict=True):
        assert a["entropy"] == pytest.approx(b["entropy"], rel=1e-4)
        assert a["even_distance"] == pytest.approx(b["even_distance"])


def words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written on pages from now on."""
    found, write = [], Mosaic.write

    def noted(page: Mosaic, left: float, top: float, text: str, *more: object, **style: object) -> None:
        found.append(text)
        write(page, left, top, text, *more, **style)

    monkeypatch.setattr(Mosaic, "write", noted)
    return found


@pytest.mark.parametrize(("kind", "heading"), [("predicted", "the class predicted"), ("label", "the true class")])
def test_the_heading_says_for_which_class_relevance_is(
    runs: dict[str, Path], smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, heading: str
) -> None:
    found = words(monkeypatch)
    arguments = ("--count", 1, "--classes-of", kind, "--out", tmp_path / "looks", *ON_CPU)
    assert smallvit("attend", runs["plain"], *arguments)[0] == 0
    assert [text for text in found if text.startswith("relevance")] == [f"relevance for\n{heading}"]


def test_what_shows_other_images_than_the_runs_test_lies_apart(
    runs: dict[str, Path], smallvit: Command, tmp_path: Path, write_images: Callable[..., list[Path]]
) -> None:
    run = shutil.copytree(runs["plain"], tmp_path / "run", ignore=shutil.ignore_patterns("attend*"))
    (image,) = write_images(tmp_path / "images", 1)
    others = {
        "attend": [(), ("digits", "test")],
        "attend-val": [("--split", "val"), ("digits", "val")],
        "attend-files": [(image,), (None, None)],
    }
    for folder, (arguments, expected) in others.items():
        count = () if folder == "attend-files" else ("--count", 1)
        assert smallvit("attend", run, *arguments, *count, *ON_CPU)[0] == 0
        record = figures(run / folder)
        assert (record["data"], record["split"]) == expected
    assert {path.name for path in run.glob("attend*")} == set(others)


def test_names_are_shown_as_they_are(
    runs: dict[str, Path], smallvit: Command, tmp_path: Path, write_images: Callable[..., list[Path]]
) -> None:
    (image,) = write_images(tmp_path / "images", 1)
    image = image.rename(image.with_name(os.fsdecode(b"caf\xe9 $x$.png")))
    names = [shutil.copytree(runs[name], tmp_path / f"{name} [b] $x$ :smile:") for name in ("plain", "plugins")]
    code, out, _ = smallvit("attend", names[0], image, "--compare", names[1], "--out", tmp_path / "looks", *ON_CPU)
    assert code == 0
    assert all(f"{name} [b] $x$ :smile:" in "".join(out.split("\n")) for name in ("plain", "plugins"))
    assert figures(tmp_path / "looks")["images"][0]["source"] == str(image)


def test_legends_have_no_formulas_but_ours(compared: Path, tmp_path: Path) -> None:
    layers = figures(compared)["layers"]
    heads.draw_heads({"$x^$": layers}, tmp_path / "heads.png")
    assert heads.draw_temperatures({"$x^$": layers}, {"$x^$": []}, tmp_path / "temperatures.png")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_is_refused_before_anything_is_computed(
    runs: dict[str, Path], smallvit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(attending, "_models", None)
    code, _, err = smallvit("attend", runs["plain"], "--out", tmp_path / place, "--overwrite", *ON_CPU)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "a file, not a folder" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_words_are_whole_on_high_pages_which_take_little_memory(tmp_path: Path) -> None:
    tracemalloc.start()
    page = Mosaic(100, 2**16 + 1000)
    places = (BAND // 2, 2 * BAND + 5, 2**16 + 900)  # in the midst, over an edge, and far below
    for top in places:
        page.write(10, top, "gypsy", size=12)
    page.save(tmp_path / "page.png")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 3 * 100 * 2**16  # bytes, the page's own
    with Image.open(tmp_path / "page.png") as picture:
        first, *others = (np.asarray(picture)[top - 40 : top + 10] for top in places)
    assert first.min() == 0
    assert all((first == other).all() for other in others)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("place", [(0, 0), (1, 2), (3, 3)])
def test_heat_is_brightest_where_the_map_is_highest(place: tuple[int, int], smooth: bool) -> None:
    weights = np.zeros((4, 4))
    weights[place] = 1
    grey = np.full((1, 8, 8), 100, dtype=np.uint8)
    drawn = gaze.heat(grey, weights, 0, 1, 64, smooth=smooth).sum(axis=2)
    assert drawn.shape == (64, 64)
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert (row // 16, column // 16) == place
    means = drawn.reshape(4, 16, 4, 16).mean(axis=(1, 3))
    assert np.unravel_index(means.argmax(), means.shape) == place
    if not smooth:
        cold = np.delete(means.flatten(), 4 * place[0] + place[1])
        np.testing.assert_allclose(cold, cold[0])


def test_the_image_shows_through_the_heat() -> None:
    image = np.zeros((3, 8, 8), dtype=np.uint8)
    image[:, :, 4:] = 255
    drawn = gaze.heat(image, np.ones((2, 2)), 0, 1, 32, smooth=False)
    assert (drawn[:, 16:] > drawn[:, :16] + 0.3).all()


def test_an_even_map_has_a_share_of_one_everywhere() -> None:
    np.testing.assert_allclose(gaze.in_even_shares(np.full((3, 5), 0.02)), 1)
    assert np.isfinite(gaze.in_even_shares(np.zeros((2, 2)))).all()


def test_many_layers_and_heads_are_thinned_evenly(tmp_path: Path) -> None:
    assert gaze.evenly(3, 12) == [0, 1, 2]
    assert gaze.evenly(25, 4) == [0, 8, 16, 24]
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 16, 16)).astype(np.uint8)
    tall = []
    for depth in (3, 24):
        maps = {f"layers.{index}.blocks.long_name.attn": rng.random((32, 4, 4)) for index in range(depth)}
        gaze.draw_layers(image, "a caption that is far too long for the picture" * 3, maps, tmp_path / "drawn.png", 3)
        with Image.open(tmp_path / "drawn.png") as picture:
            tall.append(picture.size)
    assert tall[0] == tall[1]


def test_images_are_drawn_by_whole_factors_or_made_smaller() -> None:
    assert [gaze.drawn_side(size, 128) for size in (8, 48, 64, 100, 128, 224)] == [128, 96, 128, 100, 128, 128]


def test_examples_are_of_as_many_classes_as_can_be() -> None:
    sizes = np.arange(1, 11)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), sizes))
    assert labels[examples.spread(labels, 4)].tolist() == [0, 3, 6, 9]
    for count in (10, 25, 40):
        chosen = examples.spread(labels, count)
        assert len(set(chosen)) == count
        counts = np.bincount(labels[chosen], minlength=10)
        assert (counts >= np.minimum(sizes, counts.max() - 1)).all()
    assert sorted(examples.spread(labels, 1000)) == list(range(55))


def test_a_million_images_of_one_class_are_as_soon_chosen_from() -> None:
    labels = np.zeros(10**6, dtype=np.int64)
    assert examples.spread(labels, 3) == [0, 1, 2]
    labels[-1] = 1
    assert examples.spread(labels, 3) == [0, 1, 10**6 - 1]
    assert len(examples.spread(labels, 10**6)) == 10**6


def test_streamed_data_is_shown_by_its_files(image_folder: Path, tmp_path: Path, smallvit: Command) -> None:
    torch.manual_seed(0)
    spec = {"arch": "vit", "img_size": 16, "num_classes": 3, "in_chans": 3, "spt": True, "lsa": True}
    names = ["dark", "grey", "light"]
    data = {"name": "images", "class_names": names, "mean": [0.5] * 3, "std": [0.2] * 3}
    weights = checkpoint.snapshot(package.create_model(**spec))
    checkpoint.save_weights(tmp_path / "m.safetensors", weights, {"model": spec, "data": data})
    for place in (image_folder / "dark").iterdir():
        place.write_text("no image")
    options = ("--data", image_folder, "--streaming", "on", "--count", 3, "--out", tmp_path / "looks", *ON_CPU)
    code, _, err = smallvit("attend", tmp_path / "m.safetensors", *options, "--skip-corrupt")
    assert code == 0
    assert "left out: " in err
    assert "dark/" in err
    images = figures(tmp_path / "looks")["images"]
    assert [image["label"] for image in images] == ["grey", "light"]
    assert Path(images[0]["source"]).parent.name == "grey"


def test_titles_tell_models_apart() -> None:
    assert attending.titles(["runs/a", "runs/b"]) == ["a", "b"]
    assert attending.titles(["one/run", "two/run"]) == ["one/run", "two/run"]
    assert attending.titles(["timm_vit:pretrained"]) == ["timm_vit:pretrained"]


def test_a_test_that_the_model_may_have_learnt_is_refused(
    image_folder: Path, write_images: Callable[..., list[Path]], tmp_path: Path, smallvit: Command
) -> None:
    own = tmp_path / "own"
    data = ["--data", image_folder, "--arch", "vit", "--img-size", "8"]
    assert smallvit("train", *data, *QUICK[2:], "--epochs", "1", "--out", own)[0] == 0
    write_images(image_folder / "dark", 21, 40)
    code, _, err = smallvit("attend", own, "--count", "2", *ON_CPU)
    assert code == 2
    assert "are not those that it was trained with" in err
    assert not (own / "attend").exists()
    assert smallvit("attend", own, "--split", "train", "--count", "2", *ON_CPU)[0] == 0
