"""A hub of one's own: the part of its HTTP interface that downloads use, for one repository."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = "org/na-me"


class Hub:
    """Commits of a repository, and branches that name them."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.gated = False
        self.asked: list[str] = []
        self.url = ""

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit, to which the branch moves."""
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers."""
        self.asked.append(path)
        path = path.partition("?")[0]
        api, resolve = f"/api/models/{NAME}/", f"/{NAME}/resolve/"
        if path.startswith(f"{api}revision/"):
            revision = path.removeprefix(f"{api}revision/")
            commit = self.branches.get(revision, revision)
            if commit not in self.commits:
                return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
            return 200, json.dumps({"id": NAME, "sha": commit}).encode(), {}
        if path.startswith(f"{api}tree/"):
            files = self.commits[path.removeprefix(f"{api}tree/")]
            listed = [{"type": "file", "path": n, "size": len(d), "oid": _etag(d)} for n, d in files.items()]
            return 200, json.dumps(listed).encode(), {}
        if path.startswith(resolve):
            commit, _, name = path.removeprefix(resolve).partition("/")
            if self.gated:
                return 403, b"", {"X-Error-Code": "GatedRepo"}
            data = self.commits[commit][name]
            return 200, data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit}
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[None]:
    """Within the block ``hub.url`` answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, body, headers = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 -- the name that http.server calls

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> contents of the files of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
