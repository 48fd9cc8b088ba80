"""A local HTTP server that answers as it is told, faults included."""

import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """How one request is answered.

    etag: None for no mark. ranges: whether a Range is honoured; if_range: whether If-Range is. announce: Content-Length
    in place of the right one, None for none. drop: bytes after which the connection ends. pause: seconds before every
    `piece` bytes. headers: further ones.
    """

    body: bytes = b""
    status: int = 200
    etag: str | None = '"1"'
    ranges: bool = True
    if_range: bool = True
    announce: int | None = -1
    drop: int | None = None
    pause: float = 0.0
    piece: int = 1 << 16
    chunked: bool = False
    headers: dict = field(default_factory=dict)


class FaultyServer(ThreadingHTTPServer):
    """answers: those still to give, the last of them for ever. requests: (path, headers) of those that came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[Answer] = []
        self.requests: list[tuple[str, dict]] = []
        self.turn = threading.Lock()
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_GET(self) -> None:
        with self.server.turn:
            self.server.requests.append((self.path, dict(self.headers)))
            answers = self.server.answers
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self.close_connection = True
        body, status, headers = answer.body, answer.status, dict(answer.headers)
        wanted = self.headers.get("Range")
        unchanged = not answer.if_range or self.headers.get("If-Range") in (None, answer.etag)
        if wanted and answer.ranges and unchanged and status == 200:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(body) else 416
            headers.setdefault("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            body = body[start:] if status == 206 else b""
        if answer.etag:
            headers["ETag"] = answer.etag
        if answer.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif answer.announce is not None:
            headers["Content-Length"] = len(body) if answer.announce < 0 else answer.announce
        self.send_response(status)
        for name, value in {**headers, "Connection": "close"}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self._send(body if answer.drop is None else body[: answer.drop], answer)

    def _send(self, body: bytes, answer: Answer) -> None:
        try:
            for start in range(0, len(body), answer.piece):
                if answer.pause:
                    self.wfile.flush()
                    if self.server.closing.wait(answer.pause):
                        return
                piece = body[start : start + answer.piece]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if answer.chunked else piece)
            if answer.chunked and answer.drop is None:
                self.wfile.write(b"0\r\n\r\n")
        except OSError:
            pass   # the client has left

    def log_message(self, *_) -> None:
        """Nothing."""
