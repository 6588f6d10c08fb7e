"""Fetching archives from a server that misbehaves, and unpacking archives that do."""

from __future__ import annotations

import ast
import errno
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import stat
import subprocess
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

from smallvit.datasets import archives, download, table, transfer
from smallvit.datasets.archives import unpack_gzip, unpack_tar
from smallvit.datasets.download import fetch, locked
from smallvit.datasets.table import DATASETS, Archive
from smallvit.errors import InputError

CONTENT = bytes(range(256)) * 40
HALF = len(CONTENT) // 2


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`, the first requests in the manners that `server.manners` lists."""

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        manner = self.server.manners.pop(0) if self.server.manners else serve
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
        else:
            manner(self, content, int(wanted[6:-1]) if wanted else 0)

    def head(self, code: int, **headers: object) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def send(self, content: bytes) -> None:
        self.wfile.write(content)
        self.wfile.flush()
        self.server.sent += len(content)

    def log_message(self, *arguments: object) -> None:
        pass


Manner = Callable[[Handler, bytes, int], None]


def begin(handler: Handler, content: bytes, start: int) -> None:
    """The headers of an orderly answer."""
    if start:
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        handler.head(206, Content_Length=len(content) - start, Content_Range=span)
    else:
        handler.head(200, Content_Length=len(content))


def serve(handler: Handler, content: bytes, start: int) -> None:
    if start >= len(content):
        handler.head(416, Content_Range=f"bytes */{len(content)}", Content_Length=0)
    else:
        begin(handler, content, start)
        handler.send(content[start:])


def cut_after(count: int) -> Manner:
    def manner(handler: Handler, content: bytes, start: int) -> None:
        begin(handler, content, start)
        handler.send(content[start : start + count])

    return manner


def stall(handler: Handler, content: bytes, start: int) -> None:
    begin(handler, content, start)
    handler.send(content[start : start + HALF])
    handler.server.released.wait(10)


def stall_before_answering(handler: Handler, content: bytes, start: int) -> None:
    handler.server.released.wait(10)


def ignore_range(handler: Handler, content: bytes, start: int) -> None:
    serve(handler, content, 0)


def without_length(handler: Handler, content: bytes, start: int) -> None:
    handler.head(200)
    handler.send(content)


def another_range(handler: Handler, content: bytes, start: int) -> None:
    handler.head(206, Content_Length=len(content), Content_Range=f"bytes 0-{len(content) - 1}/{len(content)}")
    handler.send(content)


def hang_up(handler: Handler, content: bytes, start: int) -> None:
    handler.close_connection = True


def status(code: int) -> Manner:
    return lambda handler, content, start: handler.send_error(code)


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """A web server: its `url`, `files`, `manners`, the `requests` it got and the bytes it `sent`."""
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.url = f"http://127.0.0.1:{web.server_port}"
    web.files, web.manners, web.requests, web.sent = {"/a.bin": CONTENT}, [], [], 0
    web.released = threading.Event()
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield web
    web.released.set()
    web.shutdown()
    thread.join()
    web.server_close()


@pytest.fixture(autouse=True)
def _quick_and_undirected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BACK_OFF_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    for name in ("SMALLVIT_MIRROR", "SMALLVIT_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def archive(server: SimpleNamespace | None, file: str = "a.bin", **other: object) -> Archive:
    """The entry of a file that the server hands out."""
    return Archive(**{"file": file, "url": server and f"{server.url}/{file}", "md5": md5(CONTENT)} | other)


def refused(*arguments: object, **options: object) -> str:
    """The one line with which a fetch is refused."""
    with pytest.raises(InputError) as caught:
        fetch("set", *arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_missing_file_is_downloaded_and_a_present_one_is_not(server, tmp_path: Path) -> None:
    for _ in range(2):
        assert fetch("set", [archive(server)], tmp_path / "x" / "y") == [tmp_path / "x" / "y" / "a.bin"]
        assert (tmp_path / "x" / "y" / "a.bin").read_bytes() == CONTENT
        assert names(tmp_path / "x" / "y") == {"a.bin", "a.bin.verified"}
    assert server.requests == [("/a.bin", None)]


@pytest.mark.parametrize("manner", [cut_after(HALF), stall], ids=["closed", "silent"])
def test_a_transfer_that_breaks_off_at_half_is_resumed_there(server, tmp_path: Path, monkeypatch, manner) -> None:
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.3)
    server.manners = [manner]
    start = time.monotonic()
    (path,) = fetch("set", [archive(server)], tmp_path)
    assert time.monotonic() - start < 5  # the server is silent for longer
    assert path.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, f"bytes={HALF}-"]
    assert server.sent == len(CONTENT)


@pytest.mark.parametrize("manner", [stall_before_answering, hang_up, status(503), status(429)])
def test_a_server_that_fails_to_answer_is_asked_again(server, tmp_path: Path, monkeypatch, manner) -> None:
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.3)
    server.manners = [manner]
    (path,) = fetch("set", [archive(server)], tmp_path)
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize("manner", [ignore_range, another_range, without_length])
def test_a_server_that_cannot_resume_is_asked_for_the_whole(server, tmp_path: Path, manner) -> None:
    server.manners = [cut_after(HALF), manner]
    (path,) = fetch("set", [archive(server)], tmp_path)
    assert path.read_bytes() == CONTENT


def test_a_partial_file_that_is_complete_is_not_sent_again(server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.partial").write_bytes(CONTENT)
    (path,) = fetch("set", [archive(server)], tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.sent == 0


def test_a_partial_file_that_is_too_long_is_begun_anew(server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.partial").write_bytes(CONTENT + b"more")
    (path,) = fetch("set", [archive(server)], tmp_path)
    assert path.read_bytes() == CONTENT


def test_after_five_attempts_in_vain_the_partial_file_is_kept_for_the_next_start(server, tmp_path: Path) -> None:
    server.manners = [cut_after(100)] * 5
    message = refused([archive(server)], tmp_path)
    assert "5 times in a row (closed after 500 bytes of 10.2 kB); 500 bytes are kept" in message
    assert (tmp_path / "a.bin.partial").read_bytes() == CONTENT[:500]
    fetch("set", [archive(server)], tmp_path)
    assert server.requests[-1] == ("/a.bin", "bytes=500-")
    assert server.sent == len(CONTENT)


def test_attempts_that_make_headway_are_not_counted(server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(transfer, "HEADWAY", 100)
    server.manners = [cut_after(100)] * 20
    assert fetch("set", [archive(server)], tmp_path)[0].read_bytes() == CONTENT


def test_pauses_between_attempts_grow(server, tmp_path: Path, monkeypatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(transfer, "BACK_OFF_SECONDS", 1)
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.manners = [status(500)] * 9
    refused([archive(server)], tmp_path)
    assert pauses == [1, 2, 4, 8]


def test_a_wrong_checksum_removes_what_came_and_names_the_way_out(server, tmp_path: Path) -> None:
    server.files["/a.bin"] = b"<html>moved</html>"
    message = refused([archive(server)], tmp_path)
    for part in (f"{server.url}/a.bin", "18 bytes", md5(b"<html>moved</html>"), md5(CONTENT), "--data-url"):
        assert part in message
    assert names(tmp_path) == set()


@pytest.mark.parametrize("code", [403, 404, 410])
def test_an_answer_that_will_stay_is_not_asked_for_again(server, tmp_path: Path, code: int) -> None:
    server.manners = [status(code)] * 9
    message = refused([archive(server)], tmp_path)
    for part in (f"{server.url}/a.bin", str(code), f"put a.bin (md5 {md5(CONTENT)}) into {tmp_path}", "--data-url"):
        assert part in message
    assert len(server.requests) == 1


def test_without_network_the_message_says_which_files_to_put_where(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(time, "sleep", None)  # told at once
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}"
    wanted = [Archive(file=file, url=f"{url}/{file}", md5=md5(file.encode())) for file in ("a.bin", "b.bin")]
    message = refused(wanted, tmp_path)
    assert "cannot be reached (Connection refused)" in message
    assert f"put a.bin (md5 {md5(b'a.bin')}), b.bin (md5 {md5(b'b.bin')}) into {tmp_path}" in message


@pytest.mark.parametrize("value", ["1", "yes"])
def test_offline_nothing_is_asked_of_the_network(server, tmp_path: Path, monkeypatch, value: str) -> None:
    monkeypatch.setenv("SMALLVIT_OFFLINE", value)
    message = refused([archive(server)], tmp_path)
    assert f"put a.bin (md5 {md5(CONTENT)}) into {tmp_path}" in message
    assert "SMALLVIT_OFFLINE" in message
    assert server.requests == []
    (tmp_path / "a.bin").write_bytes(CONTENT)
    assert fetch("set", [archive(server)], tmp_path) == [tmp_path / "a.bin"]


def test_offline_is_off_by_nothing_or_zero_and_an_argument_goes_first(server, tmp_path: Path, monkeypatch) -> None:
    for index, (value, argument) in enumerate((("", None), ("0", None), ("1", False))):
        monkeypatch.setenv("SMALLVIT_OFFLINE", value)
        assert fetch("set", [archive(server)], tmp_path / str(index), offline=argument)
    assert "offline" in refused([archive(server)], tmp_path / "x", offline=True)


def test_a_file_behind_a_login_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        fetch("imagenet", DATASETS["imagenet"].archives, tmp_path)
    for part in ("login", "https://image-net.org", "ILSVRC2012_img_train.tar (md5 1d675b47d978889d74fa0da5fadfb00e)"):
        assert part in str(caught.value)
    assert "ILSVRC2012_devkit_t12.tar.gz" in str(caught.value)


def test_an_argument_names_a_mirror_folder(server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SMALLVIT_MIRROR", "http://127.0.0.1:1/not/asked")
    server.files = {"/m.bin/a.bin": CONTENT, "/m.bin/b.bin": CONTENT}  # no file, as two are asked for
    for index, mirror in enumerate((f"{server.url}/m.bin", f"{server.url}/m.bin/")):
        both = [archive(None), archive(None, "b.bin")]
        assert len(fetch("set", both, tmp_path / str(index), mirror=mirror)) == 2
    assert [path for path, _ in server.requests] == ["/m.bin/a.bin", "/m.bin/b.bin"] * 2


@pytest.mark.parametrize("address", ["/other.bin", "/download?id=7"])
def test_an_argument_names_the_file_itself_where_it_is_the_only_one(server, tmp_path: Path, address: str) -> None:
    server.files = {address: CONTENT}
    assert fetch("set", [archive(None)], tmp_path, mirror=server.url + address)[0].read_bytes() == CONTENT


def test_the_environment_names_a_mirror_with_a_folder_for_each_data_set(server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SMALLVIT_MIRROR", f"{server.url}/mirror/")
    server.files = {"/mirror/set/a.bin": CONTENT}
    assert fetch("set", [archive(None, url="http://127.0.0.1:1/a.bin")], tmp_path)[0].read_bytes() == CONTENT


def test_what_a_mirror_sends_is_checked_too(server, tmp_path: Path) -> None:
    server.files = {"/m/a.bin": b"something else"}
    assert f"expected {md5(CONTENT)}" in refused([archive(None)], tmp_path, mirror=f"{server.url}/m")
    assert names(tmp_path) == set()


def test_a_mirror_may_be_a_folder_of_this_machine_offline_too(tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "a.bin").write_bytes(CONTENT)
    mirror = (tmp_path / "mirror").as_uri()
    assert fetch("set", [archive(None)], tmp_path, mirror, offline=True)[0].read_bytes() == CONTENT
    message = refused([archive(None, "b.bin")], tmp_path, mirror)
    assert "b.bin: cannot be reached (No such file or directory)" in message


@pytest.mark.parametrize(
    "mirror", ["ftp://host/m", "/mnt/mirror", "host/m", "", "http://[bad", "http://a b/", "file\n:"]
)
def test_other_addresses_than_http_and_file_are_refused(tmp_path: Path, monkeypatch, mirror: str) -> None:
    assert "--data-url" in refused([archive(None)], tmp_path, mirror=mirror)
    if mirror:
        monkeypatch.setenv("SMALLVIT_MIRROR", mirror)
        assert refused([archive(None)], tmp_path).startswith("SMALLVIT_MIRROR")


@pytest.mark.parametrize("mirror", ["http://host:port/", "http://", "http://höst ö/".replace(" ", "")])
def test_addresses_that_lead_nowhere_are_told_in_a_line(tmp_path: Path, mirror: str) -> None:
    assert "a.bin" in refused([archive(None)], tmp_path, mirror=mirror)


def test_a_file_is_hashed_once_and_again_only_after_it_changed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    fetch("set", [archive(None)], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(download, "_md5", None)  # cannot be called
        fetch("set", [archive(None)], tmp_path)
    changed = b"x" + CONTENT[1:]
    (tmp_path / "a.bin").write_bytes(changed)
    os.utime(tmp_path / "a.bin", ns=(1, 1))
    message = refused([archive(None)], tmp_path)
    for part in (str(tmp_path / "a.bin"), md5(changed), f"expected {md5(CONTENT)}", "remove it"):
        assert part in message
    assert (tmp_path / "a.bin").read_bytes() == changed


def test_a_note_for_another_checksum_or_a_broken_one_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    fetch("set", [archive(None)], tmp_path)
    assert "expected 0123" in refused([archive(None, md5="0123")], tmp_path)
    (tmp_path / "a.bin.verified").write_text("{")
    fetch("set", [archive(None)], tmp_path)
    assert json.loads((tmp_path / "a.bin.verified").read_text())["md5"] == md5(CONTENT)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(server, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.bin.partial").write_bytes(CONTENT[:HALF])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=HALF - 1))
    assert "a.bin needs 5.1 kB more" in refused([archive(server)], tmp_path)
    assert (tmp_path / "a.bin.partial").read_bytes() == CONTENT[:HALF]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=HALF))
    fetch("set", [archive(server)], tmp_path)


class FullDisk(io.FileIO):
    """A file on a disk with room for `ROOM` bytes more."""

    ROOM = 3000

    def write(self, block: bytes) -> int:
        room = self.ROOM - self.tell()
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(bytes(block[:room]))


def test_a_disk_that_fills_up_midway_keeps_what_came(server, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "open", lambda path, mode, buffering: FullDisk(path, mode), raising=False)
        message = refused([archive(server)], tmp_path)
    assert "disk full at 3.0 kB of a.bin" in message
    assert "7.2 kB more are needed" in message
    assert (tmp_path / "a.bin.partial").read_bytes() == CONTENT[:3000]
    fetch("set", [archive(server)], tmp_path)
    assert server.requests[-1] == ("/a.bin", "bytes=3000-")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_device_that_is_full_is_told_in_a_line(server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.partial").symlink_to("/dev/full")
    assert "disk full" in refused([archive(server)], tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_real_disk_that_fills_up_is_told_before_and_midway(server, small_disk: Path, monkeypatch) -> None:
    server.files["/a.bin"] = big = CONTENT * 200
    wanted = [archive(server, md5=md5(big))]
    assert "a.bin needs 2.0 MB more, 1.0 MB are free" in refused(wanted, small_disk)
    server.manners = [without_length]  # not known before
    assert "disk full at 1.0 MB" in refused(wanted, small_disk)
    assert big.startswith((small_disk / "a.bin.partial").read_bytes())
    (small_disk / "a.bin.partial").unlink()
    with tarfile.open(small_disk.parent / "x.tar", "w") as tar:
        add(tar, "x/y", big)
    with pytest.raises(InputError, match="disk full"):
        unpack_tar(small_disk.parent / "x.tar", small_disk / "x", "x")
    assert names(small_disk) == set()


def test_two_processes_at_once_fetch_a_file_once(server, tmp_path: Path) -> None:
    server.manners = [slow]
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=fetch, args=("set", [archive(server)], tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(20)
    assert [process.exitcode for process in both] == [0, 0]
    assert server.requests == [("/a.bin", None)]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert names(tmp_path) == {"a.bin", "a.bin.verified"}


def slow(handler: Handler, content: bytes, start: int) -> None:
    time.sleep(0.5)
    serve(handler, content, start)


def test_whoever_waits_says_what_for(server, tmp_path: Path, capfd) -> None:
    waiting = threading.Thread(target=fetch, args=("set", [archive(server)], tmp_path))
    with locked(tmp_path, "fetches mnist"):
        waiting.start()
        time.sleep(0.2)
        assert server.requests == []
    waiting.join(10)
    assert len(server.requests) == 1
    assert "waiting for another process that fetches set" in capfd.readouterr().err


def test_only_one_at_a_time_is_let_in_though_the_lock_file_comes_and_goes(tmp_path: Path) -> None:
    inside, most = [], []

    def enter() -> None:
        for _ in range(20):
            with locked(tmp_path, "counts"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(most) == 80
    assert max(most) == 1
    assert names(tmp_path) == set()


def test_an_interrupt_leaves_the_partial_file_and_no_lock(server, tmp_path: Path, monkeypatch) -> None:
    blocks = iter([CONTENT[:1000]])
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_read", lambda response: next(blocks, None) or interrupt())
        with pytest.raises(KeyboardInterrupt):
            fetch("set", [archive(server)], tmp_path)
    assert names(tmp_path) == {"a.bin.partial"}
    assert fetch("set", [archive(server)], tmp_path)[0].read_bytes() == CONTENT
    assert server.requests[-1] == ("/a.bin", "bytes=1000-")


def interrupt() -> bytes:
    raise KeyboardInterrupt


def test_a_folder_that_may_not_be_written_serves_what_it_holds(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.bin").write_bytes(CONTENT)

    def read_only(path: Path, mode: str = "r", **options: object) -> io.IOBase:
        if "r" not in mode:
            raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open(path, mode, **options)

    monkeypatch.setattr(download, "open", read_only, raising=False)
    monkeypatch.setattr(Path, "write_text", lambda path, text: read_only(path, "w"))
    for _ in range(2):
        assert fetch("set", [archive(None)], tmp_path) == [tmp_path / "a.bin"]
    monkeypatch.setattr(transfer, "open", read_only, raising=False)
    mirror = tmp_path / "b.bin"
    mirror.write_bytes(CONTENT)
    message = refused([archive(None, "c.bin")], tmp_path, mirror=mirror.as_uri())
    assert f"{tmp_path}/c.bin.partial: Read-only file system" in message


def test_a_folder_that_cannot_be_made_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file" in refused([archive(None)], tmp_path / "file" / "folder")


def add(tar: tarfile.TarFile, name: str, content: bytes = b"x", **attributes: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def tar_of(tmp_path: Path) -> Callable[..., Path]:
    """Write x.tar.gz from (name, content) pairs."""

    def write(*members: tuple[str, bytes], **attributes: object) -> Path:
        path = tmp_path / "x.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name, content in members:
                add(tar, name, content, **attributes)
        return path

    return write


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_archive_is_unpacked_with_the_modes_of_new_files(tmp_path: Path, tar_of) -> None:
    source = tar_of(("a", b"1"), ("./b/c", b"2"), ("d..e", b"3"), mode=0o4711)
    unpack_tar(source, tmp_path / "new" / "x", "x")
    assert tree(tmp_path / "new") == {"x/a": b"1", "x/b/c": b"2", "x/d..e": b"3"}
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "new/x/a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_single_folder_of_the_same_name_becomes_the_folder(tmp_path: Path, tar_of) -> None:
    unpack_tar(tar_of(("x/a", b"1"), ("x/b", b"2")), tmp_path / "x", "x")
    assert tree(tmp_path / "x") == {"a": b"1", "b": b"2"}


def test_files_that_are_there_are_replaced_and_others_stay(tmp_path: Path, tar_of) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_bytes(b"damaged")
    (tmp_path / "x" / "mine").write_bytes(b"0")
    unpack_tar(tar_of(("x/a", b"1"), ("x/b/c", b"2")), tmp_path / "x", "x")
    assert tree(tmp_path / "x") == {"a": b"1", "b/c": b"2", "mine": b"0"}
    assert names(tmp_path) == {"x", "x.tar.gz"}


@pytest.mark.parametrize(
    ("name", "attributes", "reason"),
    [
        ("../evil", {}, "outside"),
        ("x/../../evil", {}, "outside"),
        ("{tmp}/evil", {}, "outside"),
        ("x/evil\n", {"type": tarfile.SYMTYPE, "linkname": "/etc"}, "link"),
        ("evil", {"type": tarfile.LNKTYPE, "linkname": "x/first"}, "link"),
        ("evil", {"type": tarfile.CHRTYPE}, "device"),
        ("evil", {"type": tarfile.FIFOTYPE}, "device"),
    ],
)
def test_members_that_reach_elsewhere_are_refused_by_name(
    tmp_path: Path, name: str, attributes: dict[str, object], reason: str
) -> None:
    name = name.replace("{tmp}", str(tmp_path))
    home = tmp_path / "home"
    home.mkdir()
    with tarfile.open(home / "x.tar", "w") as tar:
        add(tar, "x/first")
        add(tar, name, b"", **attributes)
    with pytest.raises(InputError, match=reason) as caught:
        unpack_tar(home / "x.tar", home / "x", "x")
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert set(tree(tmp_path)) == {"home/x.tar"}


def test_an_interrupted_extraction_is_not_taken_for_a_whole_one(tmp_path: Path, tar_of, monkeypatch) -> None:
    source = tar_of(("x/a", b"1"), ("x/b", b"2"))
    written: list[Path] = []

    def write_one(content: io.IOBase, path: Path) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        path.parent.mkdir(parents=True)
        path.write_bytes(content.read())

    with monkeypatch.context() as patch:
        patch.setattr(archives, "write", write_one)
        with pytest.raises(KeyboardInterrupt):
            unpack_tar(source, tmp_path / "x", "x")
    assert names(tmp_path) == {"x.tar.gz"}
    unpack_tar(source, tmp_path / "x", "x")
    assert tree(tmp_path / "x") == {"a": b"1", "b": b"2"}


def test_what_a_killed_extraction_left_is_replaced(tmp_path: Path, tar_of) -> None:
    (tmp_path / "x.partial" / "x").mkdir(parents=True)
    (tmp_path / "x.partial" / "x" / "stale").write_bytes(b"0")
    unpack_tar(tar_of(("x/a", b"1")), tmp_path / "x", "x")
    assert tree(tmp_path / "x") == {"a": b"1"}
    (tmp_path / "y.partial").write_bytes(b"something longer")
    (tmp_path / "y.gz").write_bytes(gzip.compress(b"1"))
    unpack_gzip(tmp_path / "y.gz", tmp_path / "y", "y")
    assert (tmp_path / "y").read_bytes() == b"1"
    assert names(tmp_path) == {"x", "x.tar.gz", "y", "y.gz"}


def test_a_damaged_archive_is_told_and_leaves_nothing(tmp_path: Path, tar_of) -> None:
    source = tar_of(("x/a", os.urandom(5000)))
    source.write_bytes(source.read_bytes()[:3000])
    (tmp_path / "y.gz").write_bytes(gzip.compress(os.urandom(5000))[:3000])
    (tmp_path / "z.gz").write_bytes(b"no archive")
    for unpack, name, into in ((unpack_tar, "x.tar.gz", "x"), (unpack_gzip, "y.gz", "y"), (unpack_gzip, "z.gz", "z")):
        with pytest.raises(InputError, match=rf"{name}: damaged .*remove it"):
            unpack(tmp_path / name, tmp_path / into, into)
    with pytest.raises(InputError, match="damaged"):
        unpack_tar(tmp_path / "z.gz", tmp_path / "z", "z")
    assert names(tmp_path) == {"x.tar.gz", "y.gz", "z.gz"}


def test_a_disk_that_fills_up_while_unpacking_is_told_and_leaves_nothing(tmp_path: Path, tar_of, monkeypatch) -> None:
    source = tar_of(("x/a", CONTENT))

    def open_small(path: Path, mode: str) -> io.IOBase:
        return FullDisk(path, mode) if "w" in mode else open(path, mode)

    monkeypatch.setattr(FullDisk, "ROOM", 0)
    monkeypatch.setattr(archives, "open", open_small, raising=False)
    with pytest.raises(InputError, match="disk full"):
        unpack_tar(source, tmp_path / "x", "x")
    assert names(tmp_path) == {"x.tar.gz"}


def test_the_table_leans_on_the_standard_library_alone() -> None:
    nodes = ast.walk(ast.parse(Path(table.__file__).read_text()))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} <= set(sys.stdlib_module_names)


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
    assert set(DATASETS) - set(sources) == {"digits", "tiny-imagenet"}


def test_the_tables_figures_fit_together() -> None:
    for name, entry in DATASETS.items():
        assert len(entry.mean) == len(entry.std) == entry.in_chans, name
        assert all(len(item.md5) == 32 for item in entry.archives)
        assert (entry.aug, entry.policy) in {
            ("basic", "cifar10"),
            *(("paper", policy) for policy in ("cifar10", "svhn", "imagenet")),
            ("deit", "imagenet"),
        }
        assert entry.flip == (name not in ("digits", "mnist", "svhn", "svhn-extra"))
    digits = (load_digits().images * (255 / 16)).round() / 255
    entry = DATASETS["digits"]
    assert (len(digits), entry.mean[0], entry.std[0]) == (
        entry.train,
        pytest.approx(digits.mean(), abs=1e-4),
        pytest.approx(digits.std(), abs=1e-4),
    )
