# SPDX-License-Identifier: Apache-2.0
"""A hub on loopback that speaks the part of Hugging Face's API that `datasets` uses.

    /api/datasets/<name>[/revision/<rev>]        info: commit, files
    /api/datasets/<name>/tree/<rev>[/<folder>]   listing, recursive
    /api/datasets/<name>/paths-info/<rev>        files by name
    /datasets/<name>/resolve/<rev>/<file>        HEAD and GET, with ETag and X-Repo-Commit

A data set is a folder `<root>/<owner>/<name>`, its commit the text of `<name>.commit` beside it. One
named `acme/gated` is gated, `acme/busy` answers 503.
"""

import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34
_ROUTE = re.compile(
    r"/(?P<api>api/)?datasets/(?P<name>[^/]+/[^/]+)"
    r"(?:/(?P<verb>revision|tree|paths-info|resolve)/(?P<rev>[^/]+)(?:/(?P<path>.*))?)?"
)


class _Handler(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str) -> None:
        self._send(status, X_Error_Code=code, X_Error_Message=code)

    def _entry(self, path: Path, base: Path) -> dict[str, Any]:
        name = path.relative_to(base).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        oid = hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
        return {"type": "file", "path": name, "oid": oid, "size": path.stat().st_size}

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        url = urllib.parse.urlsplit(self.path)
        route = _ROUTE.fullmatch(urllib.parse.unquote(url.path))
        if route is None:
            return self._error(404, "EntryNotFound")
        base = self.root / route["name"]
        if route["name"] == "acme/busy":
            return self._send(503, b"busy")
        if route["name"] == "acme/gated":
            return self._error(401, "GatedRepo")
        if not base.is_dir():
            return self._error(404, "RepoNotFound")
        named = self.root / f"{route['name']}.commit"
        commit = named.read_text() if named.is_file() else COMMIT
        if route["rev"] not in (None, "main", commit):
            return self._error(404, "RevisionNotFound")
        files = sorted(path for path in base.rglob("*") if path.is_file())
        if route["verb"] == "tree":
            folder = base / (route["path"] or "")
            if not folder.is_dir():
                return self._error(404, "EntryNotFound")
            recursive = "recursive=true" in url.query.lower()
            found = sorted(folder.rglob("*") if recursive else folder.iterdir())
            return self._json([self._entry(path, base) for path in found])
        if route["verb"] == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else []
            asked = asked or urllib.parse.parse_qs(body.decode()).get("paths", [])
            there = [base / name for name in asked if (base / name).exists()]
            return self._json([self._entry(path, base) for path in there])
        if route["verb"] == "resolve":
            path = base / (route["path"] or "")
            if not path.is_file():
                return self._error(404, "EntryNotFound")
            etag = f'"{self._entry(path, base)["oid"]}"'
            return self._send(200, path.read_bytes(), ETag=etag, X_Repo_Commit=commit)
        siblings = [{"rfilename": path.relative_to(base).as_posix()} for path in files]
        return self._json(
            {"id": route["name"], "sha": commit, "private": False, "siblings": siblings, "tags": []}
        )

    do_HEAD = do_POST = do_GET  # noqa: N815


@contextlib.contextmanager
def hub(root: Path) -> Iterator[str]:
    """The address of a hub with the data sets below `root`, for the length of the block."""
    handler = type("Handler", (_Handler,), {"root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
