"""Downloads from a server that does everything wrong: the right file, or a clear line and no file."""

import hashlib
import http.client
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import tarfile
import time
import zipfile
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from tests import tiny
from tests.faulty_server import Answer, FaultyServer
from utils import download, transfer
from utils.download import Entry, check, fetch, obtain, registry
from utils.errors import UserError
from utils.transfer import Patience

BODY = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)


@pytest.fixture
def server():
    server = FaultyServer()
    yield server
    server.close()


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were to be waited between attempts, and an environment without settings of the user's."""
    for name in ("WSSS_DOWNLOADS", "WSSS_MIRROR", "WSSS_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logging.getLogger("wsss"), "propagate", True)   # a training in this process stops that
    return []


def entry(server, body=BODY, name="file.bin", **changes):
    sha256 = hashlib.sha256(body).hexdigest()
    row = Entry("thing", "data", f"{server.url}/{name}", "http://page", name, len(body), sha256, None, "a thing")
    return row._replace(**changes)


def unhashed(server, body=BODY, name="file.bin", **changes):
    return entry(server, body, name, sha256=None, size=None, **changes)


def get(row, folder, waits, attempts=3, stall=5.0):
    return obtain(row, folder, patience=Patience(attempts, first=1.0, longest=60.0, stall=stall, sleep=waits.append))


def assert_right(row, folder, waits, body=BODY, **patience):
    assert get(row, folder, waits, **patience).read_bytes() == body
    assert not list(folder.glob("*.part*"))


def assert_refused(row, folder, waits, *words, **patience):
    with pytest.raises(UserError) as caught:
        get(row, folder, waits, **patience)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert not (folder / row.file).exists()


def ranges(server):
    return [headers.get("Range") for _, headers in server.requests]


# What goes right

def test_a_file_is_fetched_once(server, tmp_path, waits):
    server.answers = [Answer(BODY)]
    row, folder = entry(server), tmp_path / "new" / "folder"
    assert_right(row, folder, waits)
    assert_right(row, folder, waits)
    assert len(server.requests) == 1 and waits == []


@pytest.mark.parametrize("published", [8, 20, 64])
def test_a_hash_may_be_a_prefix(server, tmp_path, waits, published):
    server.answers = [Answer(BODY)]
    row = entry(server)
    assert_right(row._replace(sha256=row.sha256[:published], size=None), tmp_path, waits)


def test_md5_is_a_hash_too(server, tmp_path, waits):
    server.answers = [Answer(BODY)]
    assert_right(unhashed(server, md5=hashlib.md5(BODY).hexdigest()), tmp_path, waits)
    shutil.rmtree(tmp_path)
    assert_refused(unhashed(server, md5=hashlib.md5(OTHER).hexdigest()), tmp_path, waits, "md5", "another file")


# Broken off

DATES = [{"Last-Modified": f"Mon, 0{day} Jan 2024 00:00:00 GMT"} for day in (1, 2)]


@pytest.mark.parametrize("answers, asked", [
    ([Answer(BODY, announce=None)], [None]),
    ([Answer(BODY, chunked=True)], [None]),
    ([Answer(BODY, pause=0.02)], [None]),
    ([Answer(BODY, drop=100_000), Answer(BODY, drop=50_000), Answer(BODY)], [None, "100000", "150000"]),
    ([Answer(BODY, announce=None, drop=100_000), Answer(BODY)], [None, "100000"]),   # short, and of no length
    ([Answer(BODY, chunked=True, drop=100_000), Answer(BODY)], [None, "100000"]),
    ([Answer(OTHER, drop=100_000, etag=None), Answer(BODY, etag=None)], [None, None]),   # no mark of its version
    ([Answer(OTHER, etag=None, drop=50_000, headers=DATES[0]),
      Answer(OTHER, etag='W/"weak"', drop=50_000, headers=DATES[0], if_range=False),
      Answer(BODY, etag=None, headers=DATES[1], if_range=False), Answer(BODY, etag=None, headers=DATES[1])],
     [None, "50000", "100000", None]),
])
def test_a_broken_download_is_continued_where_it_is_the_same_file(server, tmp_path, waits, answers, asked):
    server.answers = answers
    assert_right(entry(server), tmp_path, waits, attempts=4)
    assert ranges(server) == [start and f"bytes={start}-" for start in asked]
    assert all(("If-Range" in headers) == ("Range" in headers) for _, headers in server.requests)


def test_a_later_run_continues(server, tmp_path, waits):
    server.answers = [Answer(BODY, drop=100_000), Answer(BODY)]
    assert_refused(entry(server), tmp_path, waits, "ended after 100000 of 300000", "are kept", attempts=1)
    assert_right(entry(server), tmp_path, waits)
    assert ranges(server) == [None, "bytes=100000-"]


def test_a_killed_process_leaves_what_the_next_continues(server, tmp_path, waits):
    server.answers = [Answer(BODY, pause=0.2, piece=100_000), Answer(BODY)]
    process = multiprocessing.get_context("fork").Process(target=_fetch_in_a_process, args=(entry(server), tmp_path))
    process.start()
    part = tmp_path / "file.bin.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join(20)
    done = part.stat().st_size
    assert 0 < done < 300_000 and not (tmp_path / "file.bin").exists()
    assert_right(entry(server), tmp_path, waits)
    assert ranges(server) == [None, f"bytes={done}-"]


def test_a_complete_part_needs_no_request(server, tmp_path, waits, monkeypatch):
    """As after a kill between the last byte and the name."""
    server.answers = [Answer(BODY)]
    with monkeypatch.context() as killed:
        killed.setattr(download, "_fault", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            get(entry(server), tmp_path, waits)
    assert_right(entry(server), tmp_path, waits)
    assert len(server.requests) == 1


@pytest.mark.parametrize("then", [
    Answer(BODY, ranges=False),
    Answer(BODY, status=206, headers={"Content-Range": "bytes 0-299999/300000"}),
    Answer(OTHER[100_000:], status=206, headers={"Content-Range": "bytes 100000-/300000"}),
    Answer(OTHER[100_000:], status=206, headers={"Content-Range": "bytes 100000-299999/400000"}),
    Answer(b"", status=416),
], ids=["200", "another range", "a broken header", "another length", "416"])
@pytest.mark.parametrize("hashed", [True, False])
def test_ranges_refused_or_wrong(server, tmp_path, waits, then, hashed):
    server.answers = [Answer(BODY, drop=100_000), then, Answer(BODY)]
    assert_right((entry if hashed else unhashed)(server), tmp_path, waits)


@pytest.mark.parametrize("then", [
    Answer(BODY, etag='"2"'), Answer(BODY, etag='"2"', if_range=False), Answer(BODY, etag='"2"', ranges=False),
], ids=["If-Range honoured", "If-Range ignored", "no ranges"])
@pytest.mark.parametrize("hashed", [True, False])
def test_a_file_that_changes_midway(server, tmp_path, waits, then, hashed):
    server.answers = [Answer(OTHER, drop=100_000), then]
    assert_right((entry if hashed else unhashed)(server), tmp_path, waits)


def test_a_change_that_the_server_hides(server, tmp_path, waits):
    """The same mark, another file: the hash tells, and the whole is fetched again, once."""
    server.answers = [Answer(OTHER, drop=100_000), Answer(BODY)]
    assert_refused(entry(server), tmp_path, waits, attempts=1)
    assert_right(entry(server), tmp_path, waits)
    assert ranges(server) == [None, "bytes=100000-", None]


def test_another_address_starts_again(server, tmp_path, waits):
    server.answers = [Answer(OTHER, drop=100_000), Answer(BODY)]
    assert_refused(entry(server), tmp_path, waits, attempts=1)
    assert_right(entry(server, url=f"{server.url}/elsewhere"), tmp_path, waits)
    assert ranges(server) == [None, None]


def test_a_foreign_part_is_not_trusted(server, tmp_path, waits):
    server.answers = [Answer(BODY)]
    (tmp_path / "file.bin.part").write_bytes(OTHER[:1000])
    (tmp_path / "file.bin.part.json").write_text("{")
    assert_right(entry(server), tmp_path, waits)
    assert ranges(server) == [None]


def test_attempts_are_bounded_and_wait_longer_each_time(server, tmp_path, waits):
    server.answers = [Answer(BODY, drop=0)]
    assert_refused(entry(server), tmp_path, waits, "ended after 0 of 300000", "6 times in a row", attempts=6)
    assert len(server.requests) == 6
    assert all(2**i / 2 <= wait <= 2**i for i, wait in enumerate(waits)) and len(waits) == 5


def test_progress_counts_the_attempts_anew(server, tmp_path, waits, monkeypatch):
    monkeypatch.setattr(transfer, "PROGRESS", 20_000)
    server.answers = [Answer(BODY, drop=30_000)]
    assert_right(entry(server), tmp_path, waits, attempts=2)
    assert len(server.requests) == 10


# Lies and wrong files

def test_a_length_too_long(server, tmp_path, waits):
    server.answers = [Answer(BODY, announce=400_000)]
    assert_refused(entry(server, size=None), tmp_path, waits, "of 400000 bytes")
    server.answers = [Answer(BODY)]
    assert_right(entry(server, size=None), tmp_path, waits)


MORE, SUMS = BODY + b"more", [hashlib.sha256(body).hexdigest()[:16] for body in (OTHER, BODY)]


@pytest.mark.parametrize("answer, changes, words", [
    (Answer(BODY, announce=400_000), {}, ["offers 400000 bytes", "published are 300000"]),
    (Answer(BODY, announce=200_000), {}, ["offers 200000 bytes", "published are 300000"]),
    (Answer(BODY, announce=200_000), {"size": None}, ["another file than thing", "sha256"]),
    (Answer(MORE, announce=None), {}, ["more than the 300000 bytes"]),
    (Answer(MORE, chunked=True), {}, ["more than the 300000 bytes"]),
    (Answer(OTHER), {}, ["another file than thing", *SUMS]),
    (Answer(OTHER), {"size": None}, ["another file than thing", *SUMS]),
])
def test_a_wrong_file_is_refused_at_once(server, tmp_path, waits, answer, changes, words):
    server.answers = [answer]
    assert_refused(entry(server, **changes), tmp_path, waits, *words)
    assert len(server.requests) == 1 and not list(tmp_path.glob("*.part*"))


def archive(suffix):
    """A small file of that kind, as bytes."""
    buffer = io.BytesIO()
    if suffix == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("a.txt", bytes(3000))
    elif suffix == "pth":
        torch.save({"a": torch.zeros(1000)}, buffer)
    elif suffix == "pt":
        torch.save({"a": torch.zeros(1000)}, buffer, _use_new_zipfile_serialization=False)
    elif suffix == "safetensors":
        return save({"a": np.zeros(1000, np.float32)})
    elif suffix == "npz":
        np.savez(buffer, a=np.zeros(1000))
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz" if suffix == "tgz" else "w") as file:
            file.addfile(tarfile.TarInfo("a"))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["zip", "npz", "tar", "tgz", "pth", "pt", "safetensors"])
def test_without_a_hash_a_file_must_open(server, tmp_path, waits, suffix, caplog):
    body = archive(suffix)
    page = Answer(b"<html>please log in</html>")
    row = unhashed(server, body, f"file.{suffix}")
    server.answers = [page]
    assert_refused(row, tmp_path, waits, "another file than thing", "not a")
    if suffix in ("zip", "pth", "safetensors"):   # whose ends tell
        server.answers = [Answer(body[:-100], announce=None)]
        assert_refused(row, tmp_path, waits, "another file than thing")
    server.answers = [Answer(body)]
    assert_right(row, tmp_path, waits, body)
    assert any("not verified against a published hash" in record.message for record in caplog.records)
    assert check(row, tmp_path / row.file) is False


# Answers that are none

@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_refusals_are_final(server, tmp_path, waits, status):
    server.answers = [Answer(b"no", status=status)]
    reason = http.client.responses[status]
    assert_refused(entry(server), tmp_path, waits, f"answers {status} ({reason})", "by hand", "http://page")
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_faults_that_pass(server, tmp_path, waits, status):
    server.answers = [Answer(b"wait", status=status), Answer(b"wait", status=status), Answer(BODY)]
    assert_right(entry(server), tmp_path, waits)
    assert len(waits) == 2


def test_retry_after(server, tmp_path, waits):
    then = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=40), usegmt=True)
    server.answers = [
        Answer(status=429, headers={"Retry-After": "17"}), Answer(status=503, headers={"Retry-After": then}),
        Answer(status=503, headers={"Retry-After": "soon"}), Answer(BODY),
    ]
    assert_right(entry(server), tmp_path, waits, attempts=4)
    assert waits[0] == 17 and 30 < waits[1] <= 40 and waits[2] <= 4


def test_a_retry_after_too_long(server, tmp_path, waits):
    server.answers = [Answer(status=429, headers={"Retry-After": "3600"})]
    assert_refused(entry(server), tmp_path, waits, "429", "asks to wait 3600 s")
    assert waits == []


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_followed(server, tmp_path, waits, status):
    to = Answer(status=status, headers={"Location": "/other"})
    server.answers = [to, Answer(BODY, drop=100_000), to, Answer(BODY)]
    assert_right(entry(server), tmp_path, waits)
    assert [path for path, _ in server.requests] == ["/file.bin", "/other"] * 2
    assert ranges(server) == [None, None, "bytes=100000-", "bytes=100000-"]


@pytest.mark.parametrize("location", ["/file.bin", "file:///etc/passwd"])
def test_redirects_to_nowhere(server, tmp_path, waits, location):
    server.answers = [Answer(status=302, headers={"Location": location})]
    assert_refused(entry(server), tmp_path, waits, "redirects in a circle, or to no address of http")
    assert len(server.requests) < 15 and waits == []


def test_a_transfer_that_stalls(server, tmp_path, waits):
    server.answers = [Answer(BODY, pause=1.0, piece=100_000), Answer(BODY)]
    server.answers[0].drop = 200_000
    assert_right(entry(server), tmp_path, waits, stall=0.2)
    assert len(server.requests) == 2


def test_a_server_that_never_answers(tmp_path, waits):
    with FaultyServer() as server:
        server.turn.acquire()   # every request waits for its turn
        assert_refused(entry(server), tmp_path, waits, "does not answer", "2 times", attempts=2, stall=0.1)
        server.answers = [Answer(BODY)]
        server.turn.release()
        server.shutdown()


def test_no_server(server, tmp_path, waits):
    server.close()
    assert_refused(entry(server), tmp_path, waits, "cannot be reached (Connection refused)", "3 times", "by hand")


@pytest.mark.parametrize("url", [
    "ftp://host/file.bin", "file:///etc/passwd", "nonsense", "http://host:port/file.bin", "http://[/file.bin",
    "http://a b/file.bin", f"http://{'a' * 70}.org/file.bin",
])
def test_addresses_that_are_none(server, tmp_path, waits, url):
    assert_refused(entry(server, url=url), tmp_path, waits, url)
    assert waits == []


# Folders and files that are there

def test_a_wrong_file_under_the_name_is_reported(server, tmp_path, waits):
    server.answers = [Answer(BODY)]
    path = tmp_path / "file.bin"
    for body, words in ((b"short", "has 5 bytes"), (OTHER, "sha256")):
        path.write_bytes(body)
        with pytest.raises(UserError, match=words) as caught:
            get(entry(server), tmp_path, waits)
        assert "move it away" in str(caught.value) and path.read_bytes() == body
    path.write_bytes(b"")
    with pytest.raises(UserError, match="empty: move it away"):
        get(unhashed(server), tmp_path, waits)
    assert server.requests == []


def test_the_hash_of_a_file_is_remembered_until_it_changes(server, tmp_path, waits, monkeypatch):
    server.answers = [Answer(BODY)]
    row = entry(server)
    path = get(row, tmp_path, waits)
    with monkeypatch.context() as unread:
        unread.setattr(download, "hash_of", lambda *_: 1 / 0)
        assert get(row, tmp_path, waits) == path
        with pytest.raises(ZeroDivisionError):
            check(row, path, remembered=False)
    with pytest.raises(UserError, match="another file"):
        get(row._replace(sha256="0" * 64), tmp_path, waits)
    path.write_bytes(OTHER)
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match="another file"):
        get(row, tmp_path, waits)
    (tmp_path / ".file.bin.checked").write_text("[]")
    with pytest.raises(UserError, match="another file"):
        get(row, tmp_path, waits)


def test_folders_that_cannot_be_written(server, tmp_path, waits):
    server.answers = [Answer(BODY)]
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(UserError) as caught:
            get(entry(server), folder, waits)
        assert re.fullmatch(rf"{re.escape(str(folder))}\S*: (Not a directory|File exists|No such file or directory)",
                            str(caught.value))


def test_a_full_disk(server, tmp_path, waits, monkeypatch):
    server.answers = [Answer(BODY)]
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        assert_refused(entry(server), tmp_path, waits, str(tmp_path), "300000 bytes are to come, 1000 are free")
    with tiny.full_disk(150_000):
        assert_refused(entry(server), tmp_path, waits, str(tmp_path / "file.bin"), "File too large")
    assert_right(entry(server), tmp_path, waits)


def _fetch_in_a_process(row, folder):
    assert obtain(row, folder).read_bytes() == BODY


def test_processes_at_once_fetch_once(server, tmp_path, waits):
    server.answers = [Answer(BODY, pause=0.1)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fetch_in_a_process, args=(entry(server), tmp_path)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(server.requests) == 1


# Settings

def test_a_mirror_takes_the_place_of_every_address(server, tmp_path, waits, monkeypatch):
    server.answers = [Answer(BODY)]
    row = entry(server, url="http://localhost:1/far/file.bin")
    assert obtain(row, tmp_path / "a", mirror=f"{server.url}/mirror/").read_bytes() == BODY
    monkeypatch.setenv("WSSS_MIRROR", f"{server.url}/env")
    assert obtain(row._replace(url=None), tmp_path / "b").read_bytes() == BODY
    assert [path for path, _ in server.requests] == ["/mirror/file.bin", "/env/file.bin"]
    server.answers = [Answer(OTHER)]
    assert_refused(row, tmp_path / "c", waits, "another file")


def test_offline_says_what_to_put_where(server, tmp_path, waits, monkeypatch):
    row = entry(server)
    with pytest.raises(UserError) as caught:
        obtain(row, tmp_path, offline=True)
    for word in ("thing", str(tmp_path), "file.bin", "300000 bytes", f"sha256 {row.sha256}", row.url, row.page):
        assert word in str(caught.value)
    monkeypatch.setenv("WSSS_OFFLINE", "1")
    with pytest.raises(UserError, match="offline"):
        obtain(row, tmp_path)
    (tmp_path / "file.bin").write_bytes(BODY)
    assert obtain(row, tmp_path) == tmp_path / "file.bin"
    assert server.requests == []


def test_a_file_without_an_address(server, tmp_path, waits):
    row = unhashed(server, url=None)
    assert_refused(row, tmp_path, waits, "by hand", "put file.bin (size and hash are not published)", "http://page")


def test_the_folder(monkeypatch, tmp_path, server, waits):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    assert download.default_folder() == tmp_path / "torch" / "hub" / "checkpoints"
    monkeypatch.setenv("WSSS_DOWNLOADS", str(tmp_path / "here"))
    server.answers = [Answer(BODY)]
    assert obtain(entry(server)) == tmp_path / "here" / "file.bin"


def test_proxies(server, tmp_path, waits, monkeypatch):
    """The server stands for the proxy, which gets whole addresses."""
    server.answers = [Answer(BODY)]
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert_right(entry(server, url="http://far.invalid/file.bin"), tmp_path / "a", waits)
    assert_right(entry(server), tmp_path / "b", waits)
    assert [path for path, _ in server.requests] == ["http://far.invalid/file.bin", "/file.bin"]


# The registry

def test_the_registry_is_consistent():
    rows = registry()
    assert rows["vit_base_imagenet"].file == "jx_vit_base_p16_224-80ecf9dd.pth"
    assert len({row.file for row in rows.values()}) == len(rows)
    figures = [figure for row in rows.values() for figure in (row.size, row.sha256, row.md5, row.url) if figure]
    assert len(set(figures)) == len(figures), "of another row, perhaps taken over by <<"
    for row in rows.values():
        assert row.page.startswith("http") and row.what
        assert row.url is None or re.match(r"https?://[^/]+/", row.url)
        in_name = re.search(r"-([0-9a-f]{8})\.pth$", row.file)
        assert not in_name or row.sha256.startswith(in_name[1])


def write_registry(monkeypatch, path, **rows):
    path.write_text(json.dumps(rows))   # JSON is YAML
    monkeypatch.setattr(download, "REGISTRY", path)


ROW = {"kind": "data", "url": None, "page": "http://page", "file": "a", "size": 1, "sha256": None, "licence": None,
       "what": "a"}


@pytest.mark.parametrize("changes, word", [
    ({"kind": "weights"}, "kind"), ({"file": "a/b"}, "file"), ({"size": -1}, "size"), ({"sha256": "xyz"}, "sha256"),
    ({"sha256": 12345678}, "sha256"), ({"md5": "12345678"}, "md5"), ({"colour": 1}, "keys"),
])
def test_a_wrong_row_is_named(monkeypatch, tmp_path, changes, word):
    write_registry(monkeypatch, tmp_path / "rows.yaml", thing={**ROW, **changes})
    with pytest.raises(UserError, match=rf"rows\.yaml: thing: .*{word}"):
        registry()


def test_names(monkeypatch, tmp_path):
    write_registry(monkeypatch, tmp_path / "rows.yaml", thing=ROW, other=ROW)
    with pytest.raises(UserError, match="'thin' is not in rows.yaml; did you mean 'thing'"):
        fetch("thin")
    (tmp_path / "a").write_bytes(b"1")
    assert fetch("thing", tmp_path) == tmp_path / "a"
