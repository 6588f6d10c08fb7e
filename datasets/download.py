"""Download archives, verify their checksums, and unpack them whole or not at all."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pooch
import requests
from rich.console import Console
from tqdm import tqdm

from smallvit.datasets.catalog import DATASETS, Archive
from smallvit.utils.errors import InputError, first_line
from smallvit.utils.files import LOCK, atomic_folder, atomic_write, locked
from smallvit.utils.terminal import create_progress

RETRIES = 2
"""Further attempts after a download failed."""
TIMEOUT = 30.0
"""Seconds without a response from the server after which an attempt fails."""
HEADERS = {"User-Agent": "smallvit", "Accept-Encoding": "identity"}
"""No transparent decompression: checksums are those of the files as stored."""


def fetch(name: str, archives: Sequence[Archive], folder: Path) -> list[Path]:
    """Download the archives that are missing in a folder, verify the others, and return their paths.

    Only one process at a time downloads to a folder.

    Args:
        name: Data set, for messages.

    Raises:
        InputError: a file has another checksum, or a missing one cannot be downloaded.
    """
    offline = os.environ.get("SMALLVIT_OFFLINE", "") not in ("", "0")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, f"downloads {name}"):
            missing = [archive for archive in archives if not _is_verified(name, folder / archive.file, archive.md5)]
            for index, archive in enumerate(missing):
                files = ", ".join(f"{each.file} (md5 {each.md5})" for each in missing[index:])
                remedy = f"put {files} into {folder}"
                if archive.url is None:
                    terms = f" ({DATASETS[name].license})" if name in DATASETS else ""
                    raise InputError(f"--data {name}: the download requires a login{terms}: {remedy}")
                if offline and not archive.url.startswith("file:"):
                    raise InputError(f"--data {name}: files are missing and SMALLVIT_OFFLINE is set: {remedy}")
                _download(name, archive, archive.url, folder, remedy)
    except OSError as error:
        raise InputError(f"--data {name}: {error.filename or folder}: {error.strerror or error}") from None
    return [folder / archive.file for archive in archives]


def _is_verified(name: str, path: Path, md5: str) -> bool:
    """Return whether a file exists, after a check of its md5."""
    if not path.exists():
        return False
    if (actual := pooch.file_hash(str(path), alg="md5")) != md5:
        raise InputError(f"--data {name}: {path} has md5 {actual}, expected {md5}; remove it to download it again")
    return True


def _download(name: str, archive: Archive, url: str, folder: Path, remedy: str) -> None:
    """Download a file; it gets its name after its checksum was verified."""
    registry = {archive.file: f"md5:{archive.md5}"}
    downloads = pooch.create(folder, "", registry=registry, urls={archive.file: url}, retry_if_failed=RETRIES)
    pooch.get_logger().setLevel("ERROR")
    size = archive.size or 1  # pooch ignores a bar of size 0, and sets the real size
    with tqdm(desc=archive.file, total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        http = pooch.HTTPDownloader(progressbar=bar, timeout=TIMEOUT, headers=HEADERS)
        try:
            downloads.fetch(archive.file, downloader=_copy if url.startswith("file:") else http)
        except (ValueError, requests.RequestException) as error:
            raise InputError(f"--data {name}: {url}: {first_line(error)}; {remedy}") from None


def _copy(url: str, path: str, _: object) -> None:
    """Copy the file of a file URL, as a downloader of pooch."""
    shutil.copyfile(url2pathname(urlsplit(url).path), path)


def unpack_tar(archive: Path, folder: Path) -> None:
    """Unpack a tar file, compressed or not, as `folder`; replace the folder if it exists.

    If all members lie in a folder of the same name, that folder becomes `folder`.

    Raises:
        InputError: the archive is damaged, a member is no file or lies outside, or the disk is full.
    """

    def without_top(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        parts = PurePosixPath(member.name).parts
        name = PurePosixPath(*(parts[1:] if parts[:1] == (folder.name,) else parts))
        return tarfile.data_filter(member.replace(name=str(name)), path)

    with explain_damage(archive), atomic_folder(folder) as partial, open_tar(archive) as tar:
        tar.extractall(partial, filter=without_top)


def unpack_gzip(archive: Path, file: Path) -> None:
    """Unpack a single gzip-compressed file.

    Raises:
        InputError: the archive is damaged, or the disk is full.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with explain_damage(archive), atomic_write(file) as partial, gzip.open(archive) as source, partial.open("wb") as to:
        shutil.copyfileobj(source, to)


@contextmanager
def open_tar(archive: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar file, with a progress bar that follows reading."""
    with (
        create_progress(Console(stderr=True)) as progress,
        progress.open(archive, "rb", description=f"unpacking {archive.name}") as raw,
        tarfile.open(fileobj=raw) as tar,
    ):
        yield tar


@contextmanager
def explain_damage(archive: Path) -> Iterator[None]:
    """Turn errors of unpacking into an `InputError` that names the archive."""
    try:
        yield
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(
            f"{archive}: damaged or unsafe ({first_line(error)}); remove it to download it again"
        ) from None
    except OSError as error:
        raise InputError(f"{archive}: cannot be unpacked ({error.strerror or first_line(error)})") from None
