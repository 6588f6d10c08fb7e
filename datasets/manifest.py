"""Read a manifest: a table (CSV, TSV or Parquet) with the path, label, split, group and weight of images.

A cell is text until `_parse` makes a row of it; what a field accepts is decided there alone.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from smallvit.datasets.image_folder import FileInfo, build_listing
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
PARQUET_REMEDY = "pip install 'smallvit[parquet]'"


class Table(NamedTuple):
    """The columns of a file that are used, as text."""

    header: list[str]
    names: dict[str, str]
    """Column of each field that the file has."""
    rows: list[tuple[str, list[str]]]
    """Place in the file ("line 7") and cells, in the order of `names`."""


class Row(NamedTuple):
    """An image of a manifest."""

    where: str
    file: FileInfo
    path: str
    """Path relative to the manifest's folder, with slashes."""
    label: str
    split: str
    group: str
    weight: float


def read_manifest(file: Path, columns: str | None = None, min_classes: int = 2) -> Listing:
    """List the images of a manifest, by split, class and path.

    Args:
        file: A .csv, .tsv or .parquet file; relative paths in it start at its folder.
        columns: Names of columns that differ from their fields, such as "path=file,label=species".
        min_classes: With 1, as for images that are only evaluated, classes may have a single image.

    Raises:
        InputError: The file or one of its rows is unusable; the line names the place.
    """

    fail = partial(_fail, file)
    table = _read_table(file, columns, ("path", "label"), fail)
    order = (*SPLITS, "all")
    rows = sorted(_parse(file, table, fail), key=lambda row: (order.index(row.split), row.label, row.path))
    class_names = sorted({row.label for row in rows})
    if len(class_names) < min_classes:
        fail(f"all rows have the label {class_names[0]!r}; at least {min_classes} classes are needed: add the others")
    _require_training_images(rows, min_classes, fail)
    number = {name: index for index, name in enumerate(class_names)}
    used = {*table.names.values()}
    ignored = [name for name in table.header if name not in used]
    notes = (f"ignored columns: {', '.join(ignored)}",) if ignored else ()
    layout = Layout(tuple(class_names), [(row.path, number[row.label], row.split) for row in rows], notes, "")
    listing = build_listing(file, layout, {row.path: row.file for row in rows})
    groups = tuple(row.group for row in rows) if "group" in table.names else None
    listing = replace(
        listing,
        base=file.parent,
        groups=groups,
        weights=tuple(row.weight for row in rows) if "weight" in table.names else None,
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
    for field, name in names.items():
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
    positions = [header.index(name) for name in names.values()]
    return Table(header, names, [(where, [cells[each] for each in positions]) for where, cells in rows])


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
            if not value:
                fail(f"the cell of {table.names[field]!r} is empty; fill it in, or remove the row", where)
        row = Row(
            where,
            *_find_file(file.parent, values["path"], where, fail),
            values["label"],
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


def _require_training_images(rows: Sequence[Row], min_classes: int, fail: Callable[..., NoReturn]) -> None:
    """Check that each class has images to train on, and enough of them if splits are held out."""
    counts = Counter(row.label for row in rows if row.split in ("train", "all"))
    for row in rows:
        if row.split != "all" and not counts[row.label]:
            fail(f"class {row.label!r} of split {row.split} has no row in split train; add one", row.where)
        if row.split == "all" and counts[row.label] < 2 <= min_classes:
            fail(f"class {row.label!r} has only this image, so none can be held out; add images", row.where)
    if not sum(row.weight for row in rows if row.split in ("train", "all")):
        fail("all weights of the training images are 0; correct them")
