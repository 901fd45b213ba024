"""A Hugging Face Hub on this machine, small enough to read: what huggingface_hub asks for when it loads and uploads."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


class FakeHub:
    """Serves repositories, each a dictionary of revisions, each a dictionary of files; takes uploads to ``main``."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []

        class Handler(_Handler):
            pass

        Handler.hub = self
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, repository: str, revision: str, directory: Path) -> None:
        """Put a directory there as one revision."""
        files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        self.repositories.setdefault(repository, {})[revision] = files

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, data: object, code: int = 200, **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer({"error": "not found"}, 404, X_Error_Code=code)

    def files(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        revisions = self.hub.repositories.get(repository, {})
        for name, files in revisions.items():
            if revision in (name, commit_of(name)):
                return commit_of(name), files
        return None

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path).strip("/").split("/")
        self.hub.requests.append(f"{self.command} {self.path}")
        if path[:2] == ["api", "models"] and path[4:5] in (["revision"], ["tree"]):
            self.listing("/".join(path[2:4]), path[5], path[4])
        elif path[2:3] == ["resolve"]:
            self.file("/".join(path[:2]), path[3], "/".join(path[4:]))
        else:
            self.missing("RepoNotFound")

    do_HEAD = do_GET

    def listing(self, repository: str, revision: str, kind: str) -> None:
        if repository not in self.hub.repositories:
            return self.missing("RepoNotFound")
        found = self.files(repository, revision)
        if found is None:
            return self.missing("RevisionNotFound")
        commit, files = found
        if kind == "tree":
            return self.answer(
                [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in files.items()
                ]
            )
        return self.answer({"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]})

    def file(self, repository: str, revision: str, name: str) -> None:
        commit, files = self.files(repository, revision) or ("", {})
        if name not in files:
            return self.missing("EntryNotFound")
        data = files[name]
        return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlparse(self.path).path).strip("/").split("/")
        self.hub.requests.append(f"POST {self.path}")
        if path == ["api", "repos", "create"]:
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.repositories.setdefault(repository, {"main": {}})
            self.answer({"url": f"{self.hub.url}/{repository}", "id": repository, "name": repository})
        elif path == ["api", "validate-yaml"]:
            self.answer({"errors": [], "warnings": []})
        elif path[4:5] == ["preupload"]:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif path[4:5] == ["commit"]:
            files = self.hub.repositories["/".join(path[2:4])].setdefault("main", {})
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {
                    "success": True,
                    "commitOid": commit_of("main"),
                    "commitUrl": f"{self.hub.url}/{path[2]}/{path[3]}/commit/{commit_of('main')}",
                }
            )
        else:
            self.missing("RepoNotFound")
