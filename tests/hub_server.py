"""A stub of the Hugging Face hub on the loopback interface: models of one commit, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Takes what `HfApi.create_repo` and `upload_folder` send, and serves `snapshot_download`."""

    files: dict[str, dict[str, bytes]]  # name of the model -> path -> content
    token = "hf_right"

    def log_message(self, *arguments: object) -> None:
        """Nothing."""

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}"
            self.files.setdefault(name, {})
            self.answer({"url": f"{self.address()}/{name}"})
        elif self.path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
            ]
            self.answer({"files": modes})
        elif self.path.endswith("/commit/main"):
            name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[name][line["value"]["path"]] = content
            self.answer(
                {"commitUrl": f"{self.address()}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
            )
        else:
            self.answer({})

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            name, _, rest = self.path.removeprefix("/").partition("/resolve/")
            content = self.files.get(name, {}).get(rest.partition("/")[2])
            if content is None:
                self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
                return
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(content, ETag=tag, X_Repo_Commit=COMMIT)
            return
        name = (
            self.path.removeprefix("/api/models/").partition("/revision/")[0].partition("/tree/")[0]
        )
        if name not in self.files:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif "/tree/" in self.path:
            self.answer(
                [
                    {
                        "type": "file",
                        "path": path,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for path, content in self.files[name].items()
                ]
            )
        else:
            siblings = [{"rfilename": path} for path in self.files[name]]
            self.answer({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})

    do_HEAD = do_GET

    def address(self) -> str:
        host, port = self.server.server_address[:2]
        return f"http://{host}:{port}"


@contextmanager
def hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """A hub that runs for a block: its address, and what it holds."""
    kind = type("OneHub", (Hub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", kind.files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
