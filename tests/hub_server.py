"""A hub on loopback: serves folders as data sets over the hub's protocol, and misbehaves on demand.

In: a folder holding owner/name/… for each data set, and a list of faults. Out: an address for
HF_ENDPOINT. A fault is spent on the first request it matches: 429 or 503 with a Retry-After, a
stall, or an answer broken off.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Fault:
    """What goes wrong. kind: 429, 503, stall, break; path: part of the addresses it hits; times:
    how often.
    """

    kind: str
    path: str = ""
    times: int = 1
    after: int = 0  # matching requests that pass before


class Hub:
    """The server, running in a thread between `with Hub(folder) as hub:` and the end of
    the block.
    """

    def __init__(
        self, folder: Path, faults: list[Fault] | None = None, stall_seconds: float = 30
    ) -> None:
        self.folder, self.faults, self.stall_seconds = (
            Path(folder),
            list(faults or []),
            stall_seconds,
        )
        self.requests: list[str] = []
        self.old_revisions: set[str] = set()  # commits that it still serves, with today's files
        self.bytes_sent = 0
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def __enter__(self) -> Hub:
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def fault(self, path: str) -> str | None:
        """The fault to commit on this request."""
        with self._lock:
            for fault in self.faults:
                if fault.path in path and fault.times:
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault.kind
        return None

    def revision(self, repo: str) -> str:
        """A commit hash: it changes when a file of the data set does."""
        state = hashlib.sha1()
        for path in self.files(repo):
            state.update(f"{path}".encode() + path.read_bytes())
        return state.hexdigest()

    def files(self, repo: str) -> list[Path]:
        return sorted(path for path in (self.folder / repo).rglob("*") if path.is_file())

    def entry(self, repo: str, path: Path) -> dict[str, Any]:
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        name = str(path.relative_to(self.folder / repo))
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self, body: bool = True) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        with hub._lock:
            hub.requests.append(
                f"{self.command} {self.path} {self.headers.get('Range', '')}".strip()
            )
        length = int(self.headers.get("Content-Length") or 0)
        sent = self.rfile.read(length).decode() if length else ""
        # large files lie elsewhere, behind a redirect
        if "/resolve/" in path and path.endswith(".parquet"):
            return self._send(
                302,
                b"",
                {"Location": f"{hub.endpoint}{self.path.replace('/resolve/', '/cdn/')}"},
                body,
            )
        fault = hub.fault(path)
        if fault in ("429", "503"):
            return self._send(int(fault), b"busy", {"Retry-After": "0"}, body)
        if fault == "stall":
            hub.stopped.wait(hub.stall_seconds)
            self.close_connection = True
            return None
        if path.startswith("/api/datasets/"):
            return self._api(path.removeprefix("/api/datasets/"), sent, body)
        match = re.fullmatch(r"/datasets/([^/]+/[^/]+)/(?:resolve|cdn)/([^/]+)/(.+)", path)
        if match:
            return self._file(*match.groups(), body, broken=fault == "break")
        return self._send(404, b"{}", {}, body)

    def _api(self, path: str, sent: str, body: bool) -> None:
        repo, rest = "/".join(path.split("/")[:2]), path.split("/")[2:]
        files = self.hub.files(repo)
        if not files:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if rest[:1] == ["tree"]:
            below = "/".join(rest[2:])
            return self._json(self._tree(repo, files, below), body)
        if rest[:1] == ["paths-info"]:
            asked = (
                json.loads(sent)["paths"]
                if sent.startswith("{")
                else parse_qs(sent).get("paths", [])
            )
            folder = self.hub.folder / repo
            found = [self.hub.entry(repo, f) for f in files if str(f.relative_to(folder)) in asked]
            folders = [
                {"type": "directory", "path": p, "oid": "0" * 40}
                for p in asked
                if (folder / p).is_dir()
            ]
            return self._json(found + folders, body)
        info = {
            "id": repo,
            "sha": rest[1]
            if rest[:1] == ["revision"] and rest[1] != "main"
            else self.hub.revision(repo),
            "private": False,
            "gated": False,
            "disabled": False,
            "tags": ["license:odc-by"],
            "cardData": {"license": "odc-by"},
            "siblings": [
                {
                    "rfilename": (entry := self.hub.entry(repo, f))["path"],
                    "size": entry["size"],
                    "blobId": entry["oid"],
                }
                for f in files
            ],
        }
        return self._json(info, body)

    def _tree(self, repo: str, files: list[Path], below: str) -> list[dict[str, Any]]:
        entries = [self.hub.entry(repo, f) for f in files]
        inside = [e for e in entries if not below or e["path"].startswith(below + "/")]
        if "recursive=true" in self.path.lower():
            return inside
        depth = len(below.split("/")) if below else 0
        folders = {
            "/".join(e["path"].split("/")[: depth + 1])
            for e in inside
            if e["path"].count("/") > depth
        }
        return [e for e in inside if e["path"].count("/") == depth] + [
            {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            for name in sorted(folders)
        ]

    def _file(self, repo: str, revision: str, name: str, body: bool, *, broken: bool) -> None:
        path = self.hub.folder / repo / name
        if not path.is_file() or revision not in {
            "main",
            self.hub.revision(repo),
            *self.hub.old_revisions,
        }:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        data = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": self.hub.revision(repo),
            "Accept-Ranges": "bytes",
        }
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status = 200
        if match:
            first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        return self._send(status, data, headers, body, broken=broken)

    def _json(self, value: Any, body: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], body: bool, *, broken: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if broken:
            data = data[: len(data) // 2]
            self.close_connection = True
        try:
            self.wfile.write(data)
            self.hub.bytes_sent += len(data)
        except OSError:
            self.close_connection = True


def write_set(folder: Path, repo: str, files: dict[str, Path | bytes], card: str = "") -> None:
    """Lay out a data set for `Hub`: files by name, and the card that names its configurations."""
    root = folder / repo
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    if card:
        (root / "README.md").write_text(card)


if __name__ == "__main__":
    import sys

    with Hub(Path(sys.argv[1])) as hub:
        print(hub.endpoint, flush=True)
        while True:
            time.sleep(3600)
