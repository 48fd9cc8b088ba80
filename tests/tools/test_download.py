"""The download tool on a registry of its own and a local server."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faulty_server import Answer, FaultyServer
from tools.download import main
from utils import download
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BODY = b"weights" * 1000


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server that gives BODY, and the registry: `good`, `wrong` (another hash), `unhashed` and `manual`."""
    for name in ("WSSS_DOWNLOADS", "WSSS_MIRROR", "WSSS_OFFLINE", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = FaultyServer()
    server.answers = [Answer(BODY)]
    row = {"kind": "data", "page": "http://page", "licence": "MIT", "what": "a thing"}
    digest = hashlib.sha256(BODY).hexdigest()

    def published(name, size, sha256, url=server.url):
        return {**row, "url": url and f"{url}/{name}", "file": f"{name}.bin", "size": size, "sha256": sha256}

    rows = {
        "good": published("good", len(BODY), digest), "wrong": published("wrong", len(BODY), "0" * 64),
        "unhashed": published("unhashed", None, None), "manual": published("manual", None, None, url=None),
    }
    (tmp_path / "rows.yaml").write_text(json.dumps(rows))
    monkeypatch.setattr(download, "REGISTRY", tmp_path / "rows.yaml")
    yield server
    server.close()


def test_get(server, tmp_path, capsys):
    folder = tmp_path / "files"
    main(["get", "good", "unhashed", "--folder", str(folder)])
    assert capsys.readouterr().out.splitlines() == [
        f"good: {folder / 'good.bin'}", f"unhashed: {folder / 'unhashed.bin'} (not verified against a published hash)"]
    with pytest.raises(UserError, match="another file than wrong"):
        main(["get", "wrong", "--folder", str(folder)])
    with pytest.raises(UserError, match="manual is not in .*: put manual.bin .* by hand, from http://page"):
        main(["get", "manual", "--folder", str(folder)])
    asked = len(server.requests)
    with pytest.raises(UserError, match="'goof' is not in rows.yaml; did you mean 'good'"):
        main(["get", "wrong", "goof", "--folder", str(folder)])
    assert len(server.requests) == asked, "a wrong name is met before anything is fetched"
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {"good.bin", "unhashed.bin"}


def test_get_from_a_mirror_and_offline(server, tmp_path):
    main(["get", "manual", "--folder", str(tmp_path), "--mirror", f"{server.url}/mirror"])
    assert server.requests[0][0] == "/mirror/manual.bin"
    with pytest.raises(UserError, match="offline mode is on: put good.bin"):
        main(["get", "good", "--folder", str(tmp_path), "--offline"])
    assert len(server.requests) == 1


def test_list(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WSSS_DOWNLOADS", str(tmp_path))
    (tmp_path / "good.bin").write_bytes(BODY)
    (tmp_path / "wrong.bin.part").write_bytes(BODY)
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    here = {line.split("  ")[0].strip(): line for line in lines[1:5]}
    assert lines[0].split() == ["name", "kind", "size", "here", "licence", "what"]
    for name, word in {"good": " yes ", "wrong": " part ", "unhashed": " no ", "manual": " no, by hand "}.items():
        assert word in here[name] and " data " in here[name] and " MIT " in here[name]
    assert "0.00 GB" in here["good"] and " ? " in here["unhashed"]


def test_verify(server, tmp_path, capsys):
    where = ["--folder", str(tmp_path)]
    main(["verify", *where])
    assert "no file of the registry" in capsys.readouterr().out
    main(["get", "good", "unhashed", *where])
    capsys.readouterr()
    main(["verify", *where])
    assert [line.split(", ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "good: right", "unhashed: not verified against a published hash"]
    before = (tmp_path / "good.bin").stat()
    (tmp_path / "good.bin").write_bytes(BODY[:-1] + b"S")
    os.utime(tmp_path / "good.bin", ns=(before.st_atime_ns, before.st_mtime_ns))   # as remembered
    with pytest.raises(UserError, match="2 of 3 files are missing or wrong"):
        main(["verify", "good", "unhashed", "manual", *where])
    out = capsys.readouterr().out
    assert "good: WRONG" in out and "sha256" in out and "manual: WRONG" in out and "unhashed: not verified" in out


def test_from_any_folder(tmp_path):
    """The tool as a user calls it: a mistake is one line and exit code 2."""
    command = [sys.executable, str(ROOT / "tools" / "download.py"), "get", "vit_base_imagenet", "--offline"]
    done = subprocess.run([*command, "--folder", "here"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: vit_base_imagenet is not in here and offline mode is on: put jx_vit_base_p16")
    assert done.stderr.count("\n") == 1
