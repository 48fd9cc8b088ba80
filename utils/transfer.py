"""One file over HTTP: resumed where it stopped, tried again where that may help, never glued from two files.

A partial file has a note beside it (PART.json): the address it comes from, the server's mark of that version of the
file (a strong ETag, or else Last-Modified) and its length. It is continued only where all of that holds still; without
a mark it starts again. Proxies are those of http_proxy, https_proxy and no_proxy.
"""

import errno
import http.client
import json
import logging
import os
import random
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError
from utils.files import replacing
from utils.progress import progress_bar

CHUNK = 1 << 20      # bytes
PROGRESS = 1 << 20   # so many bytes further than ever before, and the failures are counted anew
HEADERS = {"User-Agent": "wsss", "Accept-Encoding": "identity"}
TRY_AGAIN = (408, 425, 429)   # besides 500 and above

log = logging.getLogger("wsss.transfer")


class Patience(NamedTuple):
    """attempts: failures in a row. first, longest: seconds between two of them, doubling. stall: without a byte."""

    attempts: int = 6
    first: float = 1.0
    longest: float = 60.0
    stall: float = 30.0
    sleep: Callable[[float], None] = time.sleep


class _Passing(Exception):
    """A fault that may pass. after: seconds the server asks to wait."""

    def __init__(self, text: str, after: float = 0.0) -> None:
        super().__init__(text)
        self.after = after


class _Note(NamedTuple):
    """What is known of a partial file: its address, the mark of its version (None: none), the length of the whole."""

    url: str
    mark: str | None
    length: int | None


def transfer(url: str, part: Path, size: int | None = None, patience: Patience | None = None) -> None:
    """Downloads `url` into the file `part`, complete by all that the server says of its length.

    size: published length in bytes; another one is refused before a byte of it is stored.
    Raises UserError where the server refuses, or fails for good; what came by then is kept for the next call.
    An OSError is about the file.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url}: not an address of http or https")
    patience = patience or Patience()
    failures, farthest = 0, _length(part)
    while True:
        try:
            return _attempt(url, part, size, patience.stall)
        except _Passing as fault:
            reached = _length(part)
            failures = 1 if reached >= farthest + PROGRESS else failures + 1
            farthest = max(farthest, reached)
            if failures >= patience.attempts:
                kept = f"; the first {reached} bytes are kept, run it again to go on" if reached else ""
                raise UserError(f"{url}: {fault}, {failures} times in a row{kept}") from None
            if fault.after > patience.longest:
                raise UserError(f"{url}: {fault} and asks to wait {fault.after:.0f} s: try again then") from None
            delay = min(patience.longest, patience.first * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
            delay = max(delay, fault.after)
            log.warning("%s: %s; again in %.1f s", url, fault, delay)
            patience.sleep(delay)


def discard(part: Path) -> None:
    """Deletes a partial file and its note."""
    _note_path(part).unlink(missing_ok=True)
    part.unlink(missing_ok=True)


def _attempt(url: str, part: Path, size: int | None, stall: float) -> None:
    note, done = _read_note(part, url), _length(part)
    if note is None or (note.length is not None and done > note.length):
        note, done = None, 0
    if note and done == note.length:
        return
    resume = {"Range": f"bytes={done}-", "If-Range": note.mark} if note and note.mark and done else {}
    with _ask(url, {**HEADERS, **resume}, part, stall) as response:
        start = _start(response, note, done, part) if resume else 0
        rest = _announced(response)
        length = note.length if start and note.length is not None else None if rest is None else start + rest
        if start == 0:
            _refuse_other_size(url, length, size)
            _begin(part, _Note(url, _mark(response), length))
        _check_space(part, start, length)
        _receive(response, part, start, length, size)


def _start(response: http.client.HTTPResponse, note: _Note, done: int, part: Path) -> int:
    """The byte a response to a request for the rest begins with: 0 where the server sends the whole."""
    if response.status == 200:
        return 0
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
    same = found and (note.length is None or found[3] in ("*", str(note.length)))
    if response.status != 206 or not same or int(found[1]) != done or _mark(response) not in (None, note.mark):
        discard(part)
        raise _Passing("the server sent another part than the one asked for")
    return done


def _receive(
    response: http.client.HTTPResponse, part: Path, start: int, length: int | None, size: int | None
) -> None:
    done = start
    sizes = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    bar = progress_bar(desc=part.stem[:40], total=length, initial=start, **sizes)
    with open(part, "r+b") as file, bar:
        file.seek(start)
        while chunk := _read(response):
            file.write(chunk)
            done += len(chunk)
            bar.update(len(chunk))
            if size is not None and done > size:
                break
        file.flush()
        os.fsync(file.fileno())
    whole = size if length is None else length
    if whole is not None and done < whole:
        raise _Passing(f"the connection ended after {done} of {whole} bytes")
    if whole is not None and done > whole:
        discard(part)
        raise UserError(f"{response.url}: sends more than the {whole} bytes there should be: another file")
    _write_note(part, _read_note(part, None)._replace(length=done))   # complete, also where no length was announced


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK)
    except TimeoutError:
        raise _Passing("the transfer stalled") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Passing(f"the connection broke ({_reason(error)})") from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    def http_error_308(self, request, answer, code, *rest):   # Python 3.10 follows none
        return self.http_error_302(request, answer, 307, *rest)


def _ask(url: str, headers: dict[str, str], part: Path, stall: float) -> http.client.HTTPResponse:
    """The response; _Passing for what may pass, UserError for what will not."""
    try:
        opener = urllib.request.build_opener(_Redirects)   # with the proxies of now
        return opener.open(urllib.request.Request(url, headers=headers), timeout=stall)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            discard(part)
            raise _Passing("the server has no such part of the file") from None
        if 300 <= error.code < 400:
            raise UserError(f"{url}: redirects in a circle, or to no address of http or https") from None
        answer = f"the server answers {error.code} ({error.reason})"
        if error.code in TRY_AGAIN or error.code >= 500:
            raise _Passing(answer, _retry_after(error.headers.get("Retry-After"))) from None
        raise UserError(f"{url}: {answer}") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise UserError(f"{url}: the certificate is not trusted ({error.reason.verify_message})") from None
        raise _Passing(f"the server cannot be reached ({_reason(error.reason)})") from None
    except (http.client.InvalidURL, ValueError) as error:
        raise UserError(f"{url}: {error}") from None
    except TimeoutError:
        raise _Passing("the server does not answer") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Passing(f"the connection broke ({_reason(error)})") from None


def _refuse_other_size(url: str, length: int | None, size: int | None) -> None:
    if None not in (length, size) and length != size:
        raise UserError(f"{url}: offers {length} bytes, published are {size}: another file, or an incomplete one")


def _check_space(part: Path, start: int, length: int | None) -> None:
    free = shutil.disk_usage(part.parent).free
    if length is not None and length - start > free:
        raise OSError(errno.ENOSPC, f"no space: {length - start} bytes are to come, {free} are free", str(part.parent))


def _begin(part: Path, note: _Note) -> None:
    """An empty partial file with its note; stopped anywhere within, it leaves none that fits the other's note."""
    discard(part)
    part.touch()
    _write_note(part, note)


def _mark(response: http.client.HTTPResponse) -> str | None:
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _announced(response: http.client.HTTPResponse) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _retry_after(text: str | None) -> float:
    """Seconds from now, of a number of seconds or a date; 0 where there is none."""
    if not text:
        return 0.0
    if text.strip().isdecimal():
        return float(text)
    try:
        then = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    then = then if then.tzinfo else then.replace(tzinfo=timezone.utc)
    return max(0.0, (then - datetime.now(timezone.utc)).total_seconds())


def _read_note(part: Path, url: str | None) -> _Note | None:
    """The note of a partial file; None where there is none, or one of another address than `url`."""
    try:
        note = _Note(**json.loads(_note_path(part).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return note if url in (None, note.url) else None


def _write_note(part: Path, note: _Note) -> None:
    with replacing(_note_path(part)) as fresh:
        fresh.write_text(json.dumps(note._asdict()), encoding="utf-8")


def _note_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception | str) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
