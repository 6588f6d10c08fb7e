"""Read a manifest: a table (CSV, TSV or Parquet) with the path, label, split, group and weight of images.

A cell is text until `_parse` makes a row of it; what a field accepts is decided there alone. Images have several labels
if a label has a semicolon, as in `cat;dog`, or if labels are columns of 0 and 1 (`--columns label=cat+dog`).
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import filter as match_names
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from smallvit.datasets.image_folder import UNLABELED, FileInfo, build_listing
from smallvit.datasets.listing import (
    ALIASES,
    SPLITS,
    Layout,
    Listing,
    describe_kinds,
    is_readable,
    require_separate_groups,
    require_utf8,
)
from smallvit.utils.errors import InputError, escape_unprintable, first_line, suggest

FIELDS = ("path", "label", "split", "group", "weight")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SEPARATOR = ";"
"""Separator of an image's labels in a cell."""
FLAGS = {**dict.fromkeys(("1", "1.0", "true"), True), **dict.fromkeys(("0", "0.0", "false"), False)}
"""Contents of a column of 0 and 1, in lower case."""
PARQUET_REMEDY = "pip install 'smallvit[parquet]'"


class Table(NamedTuple):
    """The columns of a file that are used, as text."""

    header: list[str]
    names: dict[str, str]
    """Column of each field that the file has."""
    rows: list[tuple[str, list[str]]]
    """Place in the file ("line 7") and cells, in the order of `names`."""
    flags: list[str]
    """Columns of 0 and 1, one for each class, if labels are in several."""
    multi_label: bool = False
    """Whether images have several labels, or none."""


class Row(NamedTuple):
    """An image of a manifest."""

    where: str
    file: FileInfo
    path: str
    """Path relative to the manifest's folder, with slashes."""
    label: str
    """The class; with several labels, their classes in alphabetical order."""
    split: str
    group: str
    weight: float


def read_manifest(file: Path, columns: str | None = None, min_classes: int = 2, *, labels: bool = True) -> Listing:
    """List the images of a manifest, by split, class and path.

    Args:
        file: A .csv, .tsv or .parquet file; relative paths in it start at its folder.
        columns: Names of columns that differ from their fields, such as "path=file,label=species"; with several labels
            in columns of 0 and 1, "label=cat+dog" or "label=is_*".
        min_classes: With 1, as for images that are only evaluated, classes may have a single image.
        labels: Whether labels are needed. If not, the images of a table without a column of labels are one class.

    Raises:
        InputError: The file or one of its rows is unusable; the line names the place.
    """

    fail = partial(_fail, file)
    table = _read_table(file, columns, ("path", "label") if labels else ("path",), fail)
    if "label" not in table.names:
        min_classes = 1
    order = (*SPLITS, "all")
    rows = sorted(_parse(file, table, fail), key=lambda row: (order.index(row.split), row.label, row.path))
    classes = {row.label: _split_label(row.label) if table.multi_label else [row.label] for row in rows}
    class_names = sorted({name for names in classes.values() for name in names})
    if len(class_names) < max(1, min_classes):
        what = f"the label {class_names[0]!r}" if class_names else "no label"
        fail(f"all rows have {what}; at least {min_classes} classes are needed: add the others")
    _require_training_images(rows, classes, 1 if table.multi_label else min_classes, fail)
    number = {label: index for index, label in enumerate(sorted(classes))}
    sets = tuple(tuple(class_names.index(name) for name in classes[label]) for label in number)
    used = {*table.names.values(), *table.flags}
    ignored = [name for name in table.header if name not in used]
    notes = (f"ignored columns: {', '.join(ignored)}",) if ignored else ()
    if unseen := [name for name in table.flags if name not in class_names]:
        notes += (f"no class, since no image has it: {', '.join(unseen)}",)
    layout = Layout(tuple(class_names), [(row.path, number[row.label], row.split) for row in rows], notes, "")
    listing = build_listing(file, layout, {row.path: row.file for row in rows})
    groups = tuple(row.group for row in rows) if "group" in table.names else None
    listing = replace(
        listing,
        base=file.parent,
        groups=groups,
        weights=tuple(row.weight for row in rows) if "weight" in table.names else None,
        label_sets=sets if table.multi_label else None,
        content=f"{listing.content} {groups}" if groups else listing.content,
    )
    require_separate_groups(listing, [row.where for row in rows])
    return listing


def list_paths(file: Path, columns: str | None = None) -> list[str]:
    """Return the image files of a manifest, which needs no labels.

    Raises:
        InputError: The file is unusable, or has no column of paths.
    """

    table = _read_table(file, columns, ("path",), partial(_fail, file))
    position = [*table.names].index("path")
    return [os.path.join(file.parent, cells[position].strip()) for _, cells in table.rows]


def parse_columns(text: str | None) -> dict[str, str]:
    """Return the column of each field that `--columns` names.

    Raises:
        InputError: It is not of the form field=column, or a field is unknown or given twice.
    """
    names: dict[str, str] = {}
    for part in (text or "").split(",") if text is not None else ():
        field, equals, name = (each.strip() for each in part.partition("="))
        if not equals or not name:
            raise InputError(f"--columns {text}: expected field=column, e.g. path=file,label=species")
        if field not in FIELDS:
            fields = ", ".join(FIELDS)
            raise InputError(f"--columns {text}: no field {field!r}{suggest(field, FIELDS)}; fields: {fields}")
        if field in names:
            raise InputError(f"--columns {text}: {field} is given twice; name one column")
        names[field] = name
    return names


def _fail(file: Path, message: str, where: str = "") -> NoReturn:
    prefix = f"--data {file}: {where}: " if where else f"--data {file}: "
    raise InputError(prefix + escape_unprintable(message))


def _read_table(file: Path, columns: str | None, required: Sequence[str], fail: Callable[..., NoReturn]) -> Table:
    given = parse_columns(columns)
    require_utf8([], file)
    parquet = file.suffix.lower() not in DELIMITERS
    header, rows = _read_parquet(file, fail) if parquet else _read_text(file, fail)
    names = {field: given.get(field, field) for field in FIELDS if field in {*required, *given} or field in header}
    listed = ", ".join(map(repr, header))
    pairs = [(field, each) for field, name in names.items() for each in _expand(field, name, header)]
    for field, name in pairs:
        if name not in header:
            if len(header) == 1 and any(mark in header[0] for mark in ";\t|,"):
                fail(
                    f"the only column is {listed}; separate columns by commas in .csv, by tabs in .tsv files", "line 1"
                )
            remedy = "correct --columns" if field in given else f"add it, or name yours by --columns {field}=NAME"
            fail(f"no column {name!r}{suggest(name, header)} in the header, which has {listed}; {remedy}", "line 1")
        if header.count(name) > 1:
            fail(f"two columns are called {name!r}; rename one", "line 1")
    if not rows:
        fail("a header without rows; add a row for each image", "line 2")
    positions = {name: header.index(name) for _, name in pairs}
    flags = [name for field, name in pairs if field == "label"] if len(pairs) > len(names) else []
    multi_label, picked = bool(flags), []
    for where, cells in rows:
        values = {field: cells[positions[name]] for field, name in pairs}
        for name in flags:
            if (cell := cells[positions[name]].lower()) not in FLAGS:
                fail(f"{name!r} is {cell!r}; expected 0 or 1", where)
        if flags:
            values["label"] = SEPARATOR.join(name for name in flags if FLAGS[cells[positions[name]].lower()])
        multi_label |= SEPARATOR in values.get("label", "")
        picked.append((where, [*values.values()]))
    return Table(header, names, picked, flags, multi_label)


def _expand(field: str, name: str, header: Sequence[str]) -> list[str]:
    """Return the columns of a field: one, or those of several labels, joined by + or matched by a wildcard."""
    if field != "label" or name in header:
        return [name]
    return [each for part in name.split("+") for each in match_names(header, part.strip()) or [part.strip()]]


def _split_label(text: str) -> list[str]:
    """Return the classes in a cell with several labels, in alphabetical order."""
    return sorted({part.strip() for part in text.split(SEPARATOR)} - {""})


def _read_text(file: Path, fail: Callable[..., NoReturn]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the header and the rows of a CSV or TSV file; blank lines are skipped."""
    try:
        content = file.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        fail(f"cannot be read ({error.strerror})")
    except UnicodeDecodeError as error:
        fail("not UTF-8; save the file as UTF-8", f"line {content[: error.start].count(10) + 1}")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[file.suffix.lower()], strict=True)
    records: list[tuple[str, list[str]]] = []
    while True:
        where = f"line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            fail(f"unbalanced quotes, or no text ({error}); close the quote that opens there", where)
        if cells and records and len(cells) != len(records[0][1]):
            expected = len(records[0][1])
            fail(f"{len(cells)} cells, but the header has {expected}; quote cells that contain the delimiter", where)
        if cells:
            records.append((where, [cell.strip() for cell in cells]))
    if not records:
        fail("empty; the first line must name the columns, e.g. path,label", "line 1")
    return records[0][1], records[1:]


def _read_parquet(file: Path, fail: Callable[..., NoReturn]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the columns and the rows of a Parquet file, counted from 1."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        fail(f"needs a package: {PARQUET_REMEDY}")
    try:
        table = ParquetFile(file).read()
        columns = [column.to_pylist() for column in table.columns]
    except (OSError, ArrowException) as error:
        fail(f"cannot be read as Parquet ({first_line(error)}); write it again")
    rows = enumerate(zip(*columns, strict=True), 1)
    return table.column_names, [(f"row {number}", [*map(_to_text, cells)]) for number, cells in rows]


def _to_text(cell: object) -> str:
    """Return a cell as text; null and NaN are empty."""
    return "" if cell is None or cell != cell else str(cell).strip()


def _parse(file: Path, table: Table, fail: Callable[..., NoReturn]) -> Iterator[Row]:
    """Yield the rows, without exact repetitions."""
    seen: dict[str, Row] = {}
    for where, cells in table.rows:
        values = dict(zip(table.names, cells, strict=True))
        for field, value in values.items():
            if not value and not (field == "label" and table.multi_label):
                fail(f"the cell of {table.names[field]!r} is empty; fill it in, or remove the row", where)
        row = Row(
            where,
            *_find_file(file.parent, values["path"], where, fail),
            SEPARATOR.join(_split_label(values["label"])) if table.multi_label else values.get("label", UNLABELED[0]),
            _parse_split(values["split"], where, fail) if "split" in values else "all",
            values.get("group", ""),
            _parse_weight(values["weight"], where, fail) if "weight" in values else 1.0,
        )
        first = seen.setdefault(row.path, row)
        for name in Row._fields[3:]:
            one, other = getattr(first, name), getattr(row, name)
            if one != other:
                fail(f"{row.path}: {name} {other!r}, but {one!r} in {first.where}; remove one of the rows", where)
        if first is row:
            yield row


def _find_file(folder: Path, path: str, where: str, fail: Callable[..., NoReturn]) -> tuple[FileInfo, str]:
    full = os.path.normpath(os.path.join(folder, path))
    try:
        status = os.stat(full)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        start = "correct the path" if os.path.isabs(path) else f"relative paths start at {folder}"
        fail(f"{path} cannot be read ({reason}); {start}", where)
    if os.path.isdir(full):
        fail(f"{path} is a folder; name the image files in it, a row for each", where)
    if not is_readable(full):
        fail(f"{path} is no image ({describe_kinds([full])}); remove the row", where)
    name = os.path.relpath(full, folder).replace(os.sep, "/")
    return FileInfo(full, str(status.st_size), status.st_mtime_ns), name


def _parse_split(text: str, where: str, fail: Callable[..., NoReturn]) -> str:
    if text.lower() not in ALIASES:
        fail(f"unknown split {text!r}{suggest(text.lower(), ALIASES)}; use train, val or test", where)
    return ALIASES[text.lower()]


def _parse_weight(text: str, where: str, fail: Callable[..., NoReturn]) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        fail(f"weight {text}: expected a number of at least 0", where)
    return weight


def _require_training_images(
    rows: Sequence[Row], classes: dict[str, list[str]], min_classes: int, fail: Callable[..., NoReturn]
) -> None:
    """Check that each class has images to train on, and enough of them if splits are held out."""
    counts = Counter(name for row in rows if row.split in ("train", "all") for name in classes[row.label])
    for row in rows:
        for name in classes[row.label]:
            if row.split != "all" and not counts[name]:
                fail(f"class {name!r} of split {row.split} has no row in split train; add one", row.where)
            if row.split == "all" and counts[name] < 2 <= min_classes:
                fail(f"class {name!r} has only this image, so none can be held out; add images", row.where)
    if not sum(row.weight for row in rows if row.split in ("train", "all")):
        fail("all weights of the training images are 0; correct them")
