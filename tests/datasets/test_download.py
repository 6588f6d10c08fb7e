"""Test downloads from servers that fail, and unpacking of damaged or unsafe archives."""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import shutil
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from sklearn.datasets import load_digits
from torchvision import datasets as published
from torchvision.datasets.imagenet import ARCHIVE_META

from smallvit.datasets import catalog
from smallvit.datasets.catalog import DATASETS, Archive
from smallvit.datasets.download import fetch, unpack_gzip, unpack_tar
from smallvit.datasets.presets import PRESETS
from smallvit.utils.errors import InputError
from smallvit.utils.files import LOCK

CONTENT = bytes(range(256)) * 40


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; the first responses are the status codes in `server.failures`, 0 for a cut transfer."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        content = self.server.files.get(self.path)
        failure = self.server.failures.pop(0) if self.server.failures else 404 if content is None else None
        if failure:
            self.send_error(failure)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if failure == 0 else content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """Start a web server with its `url`, `files`, `failures`, and the `requests` it received."""
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.url = f"http://127.0.0.1:{web.server_port}"
    web.files, web.failures, web.requests = {"/a.bin": CONTENT}, [], []
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield web
    web.shutdown()
    thread.join()
    web.server_close()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("SMALLVIT_OFFLINE", raising=False)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def archive(server: SimpleNamespace | None, file: str = "a.bin", **other: object) -> Archive:
    return Archive(**{"file": file, "url": server and f"{server.url}/{file}", "md5": md5(CONTENT)} | other)


def refused(*arguments: object, **options: object) -> str:
    """Return the one-line error of a fetch."""
    with pytest.raises(InputError) as caught:
        fetch("set", *arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_missing_files_are_downloaded_once(server, tmp_path: Path) -> None:
    for _ in range(2):
        assert fetch("set", [archive(server)], tmp_path / "x" / "y") == [tmp_path / "x" / "y" / "a.bin"]
        assert (tmp_path / "x" / "y" / "a.bin").read_bytes() == CONTENT
        assert names(tmp_path / "x" / "y") == {"a.bin"}
    assert server.requests == ["/a.bin"]


@pytest.mark.parametrize("failures", [[0], [503], [0, 429]])
def test_failed_attempts_are_repeated(server, tmp_path: Path, failures: list[int]) -> None:
    server.failures = list(failures)
    (path,) = fetch("set", [archive(server)], tmp_path)
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 1 + len(failures)


@pytest.mark.parametrize("code", [0, 404, 503])
def test_persistent_failures_name_the_file_and_the_remedy(server, tmp_path: Path, code: int) -> None:
    server.failures = [code] * 9
    message = refused([archive(server), archive(server, "b.bin")], tmp_path)
    for part in (f"{server.url}/a.bin", str(code or ""), f"put a.bin (md5 {md5(CONTENT)}), b.bin"):
        assert part in message
    assert names(tmp_path) == set()


def test_a_wrong_checksum_is_refused_and_leaves_nothing(server, tmp_path: Path) -> None:
    server.files["/a.bin"] = b"<html>moved</html>"
    message = refused([archive(server)], tmp_path)
    assert md5(CONTENT) in message
    assert md5(b"<html>moved</html>") in message
    assert names(tmp_path) == set()


def test_an_unreachable_server_is_reported(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}"
    assert "refused" in refused([archive(None, url=f"{url}/a.bin")], tmp_path)


def test_an_existing_file_with_another_checksum_is_kept_and_refused(server, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"other")
    message = refused([archive(server)], tmp_path)
    for part in (str(tmp_path / "a.bin"), md5(b"other"), f"expected {md5(CONTENT)}", "remove it"):
        assert part in message
    assert (tmp_path / "a.bin").read_bytes() == b"other"


def test_offline_uses_existing_files_only(server, tmp_path: Path, monkeypatch) -> None:
    for value in ("1", "yes"):
        monkeypatch.setenv("SMALLVIT_OFFLINE", value)
        message = refused([archive(server)], tmp_path)
        assert f"put a.bin (md5 {md5(CONTENT)}) into {tmp_path}" in message
        assert "SMALLVIT_OFFLINE" in message
    assert server.requests == []
    (tmp_path / "a.bin").write_bytes(CONTENT)
    assert fetch("set", [archive(server)], tmp_path) == [tmp_path / "a.bin"]
    for value in ("", "0"):
        monkeypatch.setenv("SMALLVIT_OFFLINE", value)
        assert fetch("set", [archive(server)], tmp_path / f"folder{value}")


def test_files_behind_a_login_come_with_instructions(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        fetch("imagenet", DATASETS["imagenet"].archives, tmp_path)
    for part in ("login", "https://image-net.org", "ILSVRC2012_img_train.tar (md5 1d675b47d978889d74fa0da5fadfb00e)"):
        assert part in str(caught.value)
    assert "ILSVRC2012_devkit_t12.tar.gz" in str(caught.value)


def test_an_archive_may_be_a_local_file_also_offline(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SMALLVIT_OFFLINE", "1")
    (tmp_path / "my mirror").mkdir()
    (tmp_path / "my mirror" / "a.bin").write_bytes(CONTENT)
    url = (tmp_path / "my mirror" / "a.bin").as_uri()
    assert fetch("set", [archive(None, url=url)], tmp_path)[0].read_bytes() == CONTENT
    assert "No such file" in refused([archive(None, "b.bin", url=url + "x")], tmp_path)


def test_a_full_disk_is_reported(server, tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)
    assert "No space left on device" in refused([archive(None, url=(tmp_path / "b.bin").as_uri())], tmp_path)
    monkeypatch.setattr(shutil, "copyfileobj", fail)
    (tmp_path / "a.gz").write_bytes(gzip.compress(CONTENT))
    with pytest.raises(InputError, match=r"a\.gz: cannot be unpacked \(No space left on device\)"):
        unpack_gzip(tmp_path / "a.gz", tmp_path / "a")
    assert names(tmp_path) == {"a.gz"}


def test_concurrent_downloads_fetch_a_file_once(server, tmp_path: Path, capfd) -> None:
    results: list[list[Path]] = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch("set", [archive(server)], tmp_path))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[tmp_path / "a.bin"]] * 3
    assert server.requests == ["/a.bin"]
    assert not (tmp_path / LOCK).exists()


def test_unusable_folders_are_reported(server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "file" in refused([archive(server)], tmp_path / "file" / "x")


@pytest.fixture
def tar_of(tmp_path: Path) -> Callable[..., Path]:
    """Write a tar.gz file with members of these names and contents, and special members."""

    def write(files: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
        path = tmp_path / "x.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            for info in others:
                tar.addfile(info)
        return path

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_tar_file_replaces_the_folder_and_loses_its_own_top_folder(tmp_path: Path, tar_of) -> None:
    files = {"a": b"1", "sub/b": b"2"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_bytes(b"damaged")
    for prefix in ("", "data/"):
        unpack_tar(tar_of({prefix + name: content for name, content in files.items()}), tmp_path / "data")
        assert contents(tmp_path / "data") == files
        assert names(tmp_path) == {"data", "x.tar.gz"}


def test_unsafe_members_are_refused(tmp_path: Path, tar_of) -> None:
    def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info

    unsafe = [
        ({"../evil": b""}, ()),
        ({"x/../../evil": b""}, ()),
        ({}, (special("evil", tarfile.SYMTYPE, "/etc/passwd"),)),
        ({}, (special("evil", tarfile.LNKTYPE, "../../secret"),)),
        ({}, (special("evil", tarfile.CHRTYPE),)),
        ({}, (special("evil", tarfile.FIFOTYPE),)),
    ]
    for files, others in unsafe:
        with pytest.raises(InputError, match=r"x\.tar\.gz: damaged or unsafe"):
            unpack_tar(tar_of(files, *others), tmp_path / "data" / "deep")
        assert not list(tmp_path.rglob("evil*"))
        assert not (tmp_path / "data" / "deep").exists()


def test_damaged_archives_are_reported_and_leave_nothing(tmp_path: Path, tar_of) -> None:
    whole = tar_of({"a": CONTENT, "b": CONTENT}).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100] + bytes(20) + whole[120:], b"no archive", b""):
        (tmp_path / "x.tar.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"x\.tar\.gz: damaged"):
            unpack_tar(tmp_path / "x.tar.gz", tmp_path / "data")
        assert names(tmp_path) == {"x.tar.gz"}
    (tmp_path / "y.gz").write_bytes(gzip.compress(CONTENT)[:50])
    with pytest.raises(InputError, match=r"y\.gz: damaged"):
        unpack_gzip(tmp_path / "y.gz", tmp_path / "y")
    assert names(tmp_path) == {"x.tar.gz", "y.gz"}


def test_an_interrupted_extraction_leaves_nothing(tmp_path: Path, tar_of, monkeypatch) -> None:
    path = tar_of({"a": b"1"})

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", interrupt)
        with pytest.raises(KeyboardInterrupt):
            unpack_tar(path, tmp_path / "data")
    assert names(tmp_path) == {"x.tar.gz"}
    unpack_tar(path, tmp_path / "data")
    assert contents(tmp_path / "data") == {"a": b"1"}


def test_the_catalog_imports_no_other_package() -> None:
    nodes = ast.walk(ast.parse(Path(catalog.__file__).read_text()))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} <= {*sys.stdlib_module_names, "smallvit"}


def test_the_tables_checksums_are_those_that_torchvision_publishes() -> None:
    sources = {
        "cifar10": [(published.CIFAR10.filename, published.CIFAR10.url, published.CIFAR10.tgz_md5)],
        "cifar100": [(published.CIFAR100.filename, published.CIFAR100.url, published.CIFAR100.tgz_md5)],
        "imagenet": [(file, None, checksum) for file, checksum in ARCHIVE_META.values()],
    }
    sources["cifar100-coarse"] = sources["cifar100"]
    svhn = {split: (file, url, checksum) for split, (url, file, checksum) in published.SVHN.split_list.items()}
    sources["svhn"] = [svhn["train"], svhn["test"]]
    sources["svhn-extra"] = [svhn["train"], svhn["test"], svhn["extra"]]
    for name, reader in (("mnist", published.MNIST), ("fashion-mnist", published.FashionMNIST)):
        sources[name] = [(file, reader.mirrors[0] + file, checksum) for file, checksum in reader.resources]
    for name, expected in sources.items():
        assert [(item.file, item.url, item.md5) for item in DATASETS[name].archives] == expected, name


def test_the_tables_figures_fit_together() -> None:
    for name, entry in DATASETS.items():
        assert len(entry.mean) == len(entry.std), name
        assert len(entry.mean) in (0, entry.in_chans), name
        assert len(entry.class_names) in (0, entry.num_classes), name
        assert all(len(item.md5) == 32 for item in entry.archives)
        assert entry.aug in PRESETS, name
        assert entry.policy in ("cifar10", "svhn", "imagenet"), name
    assert not any(DATASETS[name].flip for name in ("digits", "mnist", "svhn", "svhn-extra"))
    assert len(load_digits().images) == DATASETS["digits"].num_train
