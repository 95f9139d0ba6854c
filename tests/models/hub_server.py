"""A hub: an HTTP server in a thread that speaks as much of the hub's API as a pull uses."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "c0ffee" * 6 + "cafe"


class HubServer:
    """Files of one repository, and the accidents that are to happen."""

    def __init__(self, repo: str, files: dict[str, bytes], *, lfs: set[str]) -> None:
        self.repo = repo
        self.files = files
        self.lfs = lfs
        self.token: str | None = None
        self.cut_at: dict[str, list[int]] = {}
        """Per file, after how many bytes the next responses break off."""
        self.damaged: set[str] = set()
        self.ranges = True
        self.status: list[int] = []
        """Statuses of the next responses, before the server is itself again."""
        self.requests: list[tuple[str, str | None]] = []
        self.url = ""

    def listing(self) -> dict:
        siblings = [{"rfilename": ".gitattributes", "size": 1, "blobId": "0" * 40}]
        for name, data in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            row = {"rfilename": name, "size": len(data), "blobId": blob}
            if name in self.lfs:
                sha256 = hashlib.sha256(data).hexdigest()
                row["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(row)
        return {"id": self.repo, "sha": COMMIT, "siblings": siblings}

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = urlsplit(handler.path).path
        wanted_range = handler.headers.get("Range")
        self.requests.append((path, wanted_range))
        if self.status:
            handler.send_error(self.status.pop(0))
        elif self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
            handler.send_error(401)
        elif path == f"/api/models/{self.repo}/revision/main":
            self.send(handler, json.dumps(self.listing()).encode())
        elif path.startswith(prefix := f"/{self.repo}/resolve/{COMMIT}/"):
            # As the real one does: the file itself lies elsewhere.
            handler.send_response(302)
            handler.send_header("X-Repo-Commit", COMMIT)
            handler.send_header("Location", f"/cdn/{path.removeprefix(prefix)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        elif path.startswith("/cdn/"):
            self.send_file(handler, path.removeprefix("/cdn/"), wanted_range)
        else:
            handler.send_error(404)

    def send_file(self, handler, name: str, wanted_range: str | None) -> None:
        data = self.files[name]
        if name in self.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        if wanted_range and self.ranges:
            start = int(wanted_range.removeprefix("bytes=").removesuffix("-"))
        cuts = self.cut_at.get(name)
        self.send(handler, data[start:], partial=start > 0, cut=cuts.pop(0) if cuts else None)

    def send(self, handler, data: bytes, *, partial=False, cut: int | None = None) -> None:
        handler.send_response(206 if partial else 200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data if cut is None else data[:cut])
        handler.close_connection = True


@contextmanager
def serving(repo: str, files: dict[str, bytes], *, lfs: set[str]):
    server = HubServer(repo, files, lfs=lfs)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.answer(self)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
