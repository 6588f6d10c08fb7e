"""Test tables of image files: a folder's equal, groups, weights, and the errors of unusable ones."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from smallvit import datasets
from smallvit.config.config import Config
from smallvit.config.options import DataConfig
from smallvit.datasets.dataset import ImageDataset, divide, hold_out
from smallvit.datasets.manifest import PARQUET_REMEDY
from smallvit.training.setup import create_setup
from smallvit.utils.errors import InputError

Command = Callable[..., tuple[int, str, str]]
SPLITS = ("train", "val", "test")
HEADER = ["path", "label", "split", "group", "weight"]


def load(data: object, **options: object) -> ImageDataset:
    return datasets.create_dataset(DataConfig(data=str(data), img_size=8, **options))


def write(file: Path, rows: list[list[object]], delimiter: str = ",") -> Path:
    with open(file, "w", newline="", encoding="utf-8") as opened:
        csv.writer(opened, delimiter=delimiter).writerows(rows)
    return file


def rows_of(folder: Path, start: Path) -> list[list[object]]:
    return [[os.path.relpath(file, start), file.parent.name] for file in sorted(folder.rglob("*.png"))]


def test_a_table_equals_the_folder_of_its_images(image_folder: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder, rows = load(image_folder), rows_of(image_folder, tmp_path)
    shuffled = [["file", "note", "species"], *([path, "-", label] for path, label in rows[::-1])]
    tables = [
        write(image_folder / "labels.csv", [["path", "label"], *rows_of(image_folder, image_folder)]),
        write(tmp_path / "other.tsv", shuffled, "\t"),
        tmp_path / "other.parquet",
    ]
    columns = dict(zip(shuffled[0], zip(*shuffled[1:], strict=True), strict=True))
    parquet.write_table(pyarrow.table({name: list(column) for name, column in columns.items()}), tables[2])
    for table in tables:
        columns = None if table.parent == image_folder else "path=file,label=species"
        data = load(table, columns=columns)
        assert data.class_names == folder.class_names
        for split in SPLITS:
            mine, theirs = getattr(data, split), getattr(folder, split)
            assert torch.equal(mine.pixels, theirs.pixels)
            assert torch.equal(mine.labels, theirs.labels)
        assert data.fingerprint == folder.fingerprint
        assert (data.content == folder.content) == (table.parent == image_folder)
        assert load(table, columns=columns, streaming="on", workers=0).content == data.content


def test_groups_stay_together_in_tables_and_folders(image_folder: Path, tmp_path: Path) -> None:
    """Groups of four images in a row; a fifth of the images is held out, of every class."""
    rows = [[*row, f"{row[1]}{index // 4}"] for index, row in enumerate(rows_of(image_folder, tmp_path))]
    table = write(tmp_path / "a.csv", [["path", "label", "group"], *rows])
    group_of = {path: group for path, _, group in rows}
    for data in (load(table), load(table, streaming="on", workers=0)):
        groups = [{group_of[path] for path in getattr(data, split).paths} for split in SPLITS]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 15
        assert [len(getattr(data, split)) for split in SPLITS] == [36, 12, 12]
        assert all(set(getattr(data, split).labels.tolist()) == {0, 1, 2} for split in SPLITS)
        assert "test split: 12 images of 3 groups, stratified, seed 0" in data.notes
    for pattern in (r"\d\.png", r"/\d\d(\d)"):  # groups of the last digit
        by_name = load(image_folder, group_by=pattern)
        digits = [{path[-5] for path in getattr(by_name, split).paths} for split in SPLITS]
        assert list(map(len, digits)) == [7, 1, 2]
        assert len(set.union(*digits)) == 10


def test_groups_are_held_out_of_every_class_where_that_is_possible() -> None:
    """Unequal groups of one class or several, at several shares."""
    rng = np.random.default_rng(0)
    for fraction in (0.1, 0.2, 0.5, 0.8):
        groups = rng.integers(0, 40, 400)
        labels = np.where(rng.random(400) < 0.7, groups % 4, rng.integers(0, 4, 400))
        rest, out = hold_out(labels, fraction, 0, "a test split", tuple("abcd"), groups.astype(str))
        assert not set(groups[rest]) & set(groups[out])
        assert sorted([*rest, *out]) == list(range(400))
        assert set(labels[rest]) == set(labels[out]) == {0, 1, 2, 3}
        assert len(out) / 400 == pytest.approx(fraction, abs=0.1)


def test_the_loss_of_an_image_is_multiplied_by_its_weight(image_folder: Path, tmp_path: Path) -> None:
    """Mixed images: each label has its share times the weight of that label's image."""
    rows = [[*row, "train" if i % 20 else "test", 1 + i % 3] for i, row in enumerate(rows_of(image_folder, tmp_path))]
    table = write(tmp_path / "a.csv", [["path", "label", "split", "weight"], *rows])
    options = {"data": str(table), "img_size": 8, "device": "cpu", "epochs": 1, "arch": "vit96", "amp": "off"}
    setup = create_setup(Config.build(**options, mixup_prob=1.0, cutmix=1.0, batch_size=16, label_smoothing=0.1))
    plain = create_setup(Config.build(**options | {"data": str(image_folder)}))
    assert plain.objective.loss.function is not setup.objective.loss.function
    images, targets = next(setup.batches.epoch(0))
    total = targets.sum(dim=1)
    assert ((total >= 1) & (total <= 3)).all()
    assert total.unique().numel() > 3
    logits = torch.randn(len(images), 3)
    loss = setup.objective(lambda _: logits, images, targets)["loss"]
    smooth = 0.9 * targets + 0.1 * total[:, None] / 3
    assert loss.item() == pytest.approx(-(smooth * F.log_softmax(logits, 1)).sum(1).mean().item(), rel=1e-5)
    assert setup.evaluate("test")["images"] == 3


def test_several_labels_are_in_a_cell_or_in_columns(image_folder: Path, tmp_path: Path) -> None:
    paths = [path for path, _ in rows_of(image_folder, tmp_path)]
    sets = [{"red"} if i % 3 else {"red", "blue"} if i % 2 else set() for i in range(len(paths))]
    cells = [["path", "label"], *([path, " ; ".join(each)] for path, each in zip(paths, sets, strict=True))]
    flags = [["path", "red", "other", "blue", "no"]]
    flags += [[path, int("red" in each), "-", "blue" in each, "0.0"] for path, each in zip(paths, sets, strict=True)]
    data = load(write(tmp_path / "cells.csv", cells), streaming="on", workers=0)
    columns = load(write(tmp_path / "columns.csv", flags), columns="label=b*+red+no")
    assert data.class_names == columns.class_names == ("blue", "red")
    assert {"ignored columns: other", "no class, since no image has it: no"} <= {*columns.notes}
    assert load(image_folder).label_sets is None
    assert {data.label_name(label) for label in data.train.labels.tolist()} == {"blue; red", "red", ""}
    for one in (data, columns):
        assert sum(len(getattr(one, split)) for split in SPLITS) == len(paths)
        for split in SPLITS:
            part = getattr(one, split)
            expected = [sets[paths.index(path)] for path in part.paths]
            targets = one.targets[part.labels]
            assert targets.tolist() == [[float(name in each) for name in one.class_names] for each in expected]
            assert targets.any(dim=0).all()
    moved = write(tmp_path / "cells.csv", [cells[0], [cells[1][0], "red;"], *cells[2:]])
    assert (
        load(moved).fingerprint
        != columns.fingerprint
        == load(tmp_path / "columns.csv", columns="label=b*+red").fingerprint
    )


def test_images_with_several_labels_are_divided_by_the_rarest_class_first() -> None:
    rng = np.random.default_rng(0)
    targets = rng.random((1000, 6)) < [0.5, 0.2, 0.1, 0.03, 0.01, 0.005]
    groups = rng.integers(0, 300, 1000)
    for shares in ((0.8, 0.2), (0.1, 0.2, 0.3, 0.4)):
        parts = divide(targets, shares, 0)
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
        for part, share in zip(parts, shares, strict=True):
            assert np.abs(targets[part].sum(axis=0) - share * targets.sum(axis=0)).max() <= 1.5
            assert abs(len(part) - 1000 * share) <= 2
            assert targets[part].any(axis=0).all()
        parts = divide(targets, shares, 0, groups)
        assert sum(len(np.unique(groups[part])) for part in parts) == len(np.unique(groups))
    assert all(map(np.array_equal, divide(targets, (0.5, 0.5), 1), divide(targets, (0.5, 0.5), 1)))


def test_unusable_tables_say_where_and_what_to_do(image_folder: Path, tmp_path: Path, smallvit: Command) -> None:
    """Name file, location and remedy in one line, with exit code 2."""
    good = [[*row, "train" if i % 5 else "test", f"g{i}", 1] for i, row in enumerate(rows_of(image_folder, tmp_path))]
    table = tmp_path / "a.csv"

    def change(row: int, column: int, value: object) -> list[list[object]]:
        return [[value if (i, j) == (row, column) else cell for j, cell in enumerate(each)] for i, each in all_rows]

    def without(*columns: str) -> list[list[object]]:
        return [[cell for name, cell in zip(HEADER, row, strict=True) if name not in columns] for row in complete]

    complete = [HEADER, *good]
    all_rows = list(enumerate(complete))
    text = "\n".join(",".join(map(str, row)) for row in complete)
    first = good[0][0]
    tables: list[tuple[object, str]] = [
        (good, "line 1: no column 'path' in the header"),
        (without("label"), "line 1: no column 'label'"),
        (change(0, 0, "Path"), "no column 'path' (did you mean 'Path'?) in the header"),
        (change(0, 4, "label"), "line 1: two columns are called 'label'; rename one"),
        (change(2, 0, ""), "line 3: the cell of 'path' is empty; fill it in"),
        (change(2, 1, " "), "line 3: the cell of 'label' is empty; fill it in"),
        (change(5, 3, ""), "line 6: the cell of 'group' is empty; fill it in"),
        (change(2, 2, "tst"), "line 3: unknown split 'tst' (did you mean 'test'?); use train, val or test"),
        (change(2, 0, "images/no.png"), "line 3: images/no.png cannot be read (No such file or directory); relative"),
        (change(2, 0, "/no/such.png"), "line 3: /no/such.png cannot be read (No such file or directory); correct the"),
        (change(2, 0, "images/dark"), "line 3: images/dark is a folder; name the image files"),
        (change(2, 0, "a.csv"), "line 3: a.csv is no image (1 CSV file); remove the row"),
        (change(2, 0, "im\nno.png"), r"line 3: im\nno.png cannot be read"),
        (
            [*complete, [first, "gray", "test", "g0", 1]],
            f"line 62: {first}: label 'gray', but 'dark' in line 2",
        ),
        ([*complete, [first, "dark", "train", "g0", 1]], "line 62: images/dark/000.png: split 'train', but 'test' in"),
        ([*complete, [first, "dark", "test", "g1", 1]], "line 62: images/dark/000.png: group 'g1', but 'g0' in line 2"),
        (change(2, 3, "g0"), "line 2: group 'g0' is in split test, but in split train at line 3; put it into one"),
        (change(2, 4, "heavy"), "line 3: weight heavy: expected a number of at least 0"),
        (change(2, 4, -1), "line 3: weight -1: expected"),
        (change(2, 4, "nan"), "line 3: weight nan: expected"),
        (change(2, 4, "inf"), "line 3: weight inf: expected"),
        ([HEADER, *([*row[:4], 0] for row in good)], "all weights of the training images are 0; correct them"),
        (change(1, 1, "new"), "line 2: class 'new' of split test has no row in split train; add one"),
        ([HEADER, *([row[0], "a", *row[2:]] for row in good)], "all rows have the label 'a'; at least 2 classes"),
        ([HEADER, *([*row[:2], "test", *row[3:]] for row in good)], "has no row in split train; add one"),
        (without("split", "group")[:22], "line 22: class 'gray' has only this image, so none can be held out; add"),
        (without("split", "group")[:23], "val/ and test/, or add --val-fraction 0 to use the last epoch"),
        (
            [["path", "label", "group"], *([*row[:2], row[1] if row[1] == "dark" else row[3]] for row in good)],
            "all images of class 'dark' are in group 'dark', so none can be held out for a test split; 3 groups",
        ),
        ([HEADER], "line 2: a header without rows; add"),
        (b"", "line 1: empty; the first line must name the columns"),
        (text.replace(",", ";").encode(), "line 1: the only column is 'path;label;split;group;weight'; separate"),
        (text.replace("dark", "d\xe4rk").encode("latin-1"), "line 2: not UTF-8; save the file as UTF-8"),
        (text.encode("utf-16"), "line 1: not UTF-8; save"),
        (text.replace("g7,", '"g7,', 1).encode(), "line 9: unbalanced quotes"),
        (text.replace("g7,", "g,7,", 1).encode(), "line 9: 6 cells, but the header has 5; quote cells"),
    ]
    cases = [([], content, message) for content, message in tables]
    cases += [
        (["--columns", "paht=file"], complete, "no field 'paht' (did you mean 'path'?); fields: path, label"),
        (["--columns", "path"], complete, "--columns path: expected field=column"),
        (["--columns", "path=a,path=b"], complete, "path is given twice; name one column"),
        (["--columns", "label=kind"], complete, "no column 'kind' in the header, which has 'path', 'label'"),
        (["--columns", "label=weight+split"], complete, "line 2: 'split' is 'test'; expected 0 or 1"),
        (["--columns", "label=weight+kind"], complete, "no column 'kind' in the header, which has 'path', 'label'"),
        ([], [HEADER, *([row[0], ";", *row[2:]] for row in good)], "all rows have no label; at least 2 classes are"),
        ([], [HEADER, *([row[0], "a;a", *row[2:]] for row in good)], "all rows have the label 'a'; at least 2 classes"),
        ([], change(1, 1, "new;dark"), "line 2: class 'new' of split test has no row in split train; add one"),
        (["--group-by", "no(.)"], without("split", "group"), "--group-by no(.): does not match images/dark/000.png"),
        (["--group-by", "(("], without("split", "group"), "--group-by ((: not a regular expression"),
        (["--group-by", "."], complete, "has a column of groups; remove one of them"),
        (["--group-by", "images"], without("group"), "group 'images' is in split"),
    ]
    for options, content, message in cases:
        if isinstance(content, bytes):
            table.write_bytes(content)
        else:
            write(table, content)
        code, out, err = smallvit("show", "--data", table, *options, "--out", tmp_path / "no.png")
        assert (code, out, err.count("\n")) == (2, "", 1), (message, err)
        assert message in err
        assert "--columns" in err or "--group-by" in err or str(table) in err
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    (tmp_path / "folder.csv").mkdir()
    for name, message in {
        "b.parquet": "b.parquet: cannot be read as Parquet",
        "no.csv": "no.csv: no such file; correct the path",
        "folder.csv": "expected at least 2 class folders with images, found none",
    }.items():
        code, _, err = smallvit("train", "--data", tmp_path / name, "--out", tmp_path / "run")
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
    assert "digits has no file names to group by" in smallvit("show", "--data", "digits", "--group-by", "x")[2]


def test_a_byte_order_mark_quotes_and_repeated_rows_are_accepted(image_folder: Path, tmp_path: Path) -> None:
    rows = rows_of(image_folder, tmp_path)
    lines = ["path,label", *(f'"{path}", "the ""{label}"" one"' for path, label in rows), "", f'{rows[0][0]},"x"']
    (tmp_path / "a.csv").write_text("\r\n".join(lines[:-1]).replace(', "', ',"'), encoding="utf-8-sig")
    assert load(tmp_path / "a.csv").class_names == tuple(f'the "{name}" one' for name in ("dark", "gray", "light"))
    write(tmp_path / "b.csv", [["path", "label"], *rows, rows[0]])
    assert sum(len(getattr(load(tmp_path / "b.csv"), split)) for split in SPLITS) == 60


def test_parquet_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(InputError, match="needs a package"):
        load(tmp_path / "a.parquet")
    assert "smallvit[parquet]" in PARQUET_REMEDY


def test_a_changed_table_changes_the_fingerprint(image_folder: Path, tmp_path: Path) -> None:
    """Labels, splits, groups and weights count; other columns and the order of rows do not."""
    complete = [[*row, f"g{i // 2}", 1, i] for i, row in enumerate(rows_of(image_folder, tmp_path))]
    header = ["path", "label", "group", "weight", "note"]

    def fingerprints(rows: list[list[object]], streaming: str) -> str:
        return load(write(tmp_path / "a.csv", [header, *rows]), streaming=streaming, workers=0).fingerprint

    for streaming in ("off", "on"):
        first = fingerprints(complete, streaming)
        assert fingerprints([[*row[:4], "x"] for row in complete[::-1]], streaming) == first
        for column, value in ((1, "gray"), (2, "g5"), (3, 2)):
            changed = [[*complete[0][:column], value, *complete[0][column + 1 :]], *complete[1:]]
            assert fingerprints(changed, streaming) != first


@pytest.mark.slow
def test_verbs_take_a_table_as_a_folder(image_folder: Path, tmp_path: Path, smallvit: Command) -> None:
    rows = [[*row, f"{row[1]}{i // 2}"] for i, row in enumerate(rows_of(image_folder, tmp_path))]
    table, run = write(tmp_path / "a.csv", [["path", "label", "group"], *rows]), tmp_path / "run"
    model = ["--arch", "vit96", "--img-size", "8", "--epochs", "2", "--device", "cpu", "--batch-size", "16"]
    assert smallvit("train", *model, "--data", table, "--out", run, "--keep-resume")[0] == 0
    code, _, err = smallvit("report", run)  # with the results of eval and attend
    assert code == 0, err
    test = load(table).test
    with open(run / "eval" / "test" / "predictions.csv", newline="") as file:
        assert tuple(row["path"] for row in csv.DictReader(file)) == test.paths
    write(tmp_path / "new.csv", [["image"], *([path] for path in test.paths)])
    images = ["--data", tmp_path / "new.csv", "--columns", "path=image"]
    code, out, err = smallvit("predict", run, *images, "--format", "csv")
    assert (code, out.count("\n")) == (0, 1 + len(test))
    write(table, [["path", "label", "group"], *([*row[:2], "other"] if row is rows[3] else row for row in rows)])
    code, _, err = smallvit("train", "--resume", run, "--epochs", "3")
    assert code == 2
    assert "not the images that the run was started with" in err
