"""As much of W&B's server as uploading runs needs, on loopback: it keeps what it is sent."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4


@dataclass
class Run:
    """What the server knows of one run."""

    fields: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exits: list[int] = field(default_factory=list)
    opened: int = 0  # how often it was opened anew, or to be resumed
    uses: list[str] = field(default_factory=list)


@dataclass
class Artifact:
    """What the server knows of one version of an artifact."""

    id: str
    name: str
    type: str
    run: str
    metadata: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False

    def manifest(self) -> dict[str, Any]:
        """Path -> entry, as W&B's client wrote it."""
        return dict(json.loads(self.files["wandb_manifest.json"])["contents"])


@dataclass
class FakeServer:
    """The server's memory: runs by id, the ids that it refuses."""

    address: str
    runs: dict[str, Run] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)  # by id
    refused: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, name: str) -> Run:
        return self.runs.setdefault(name, Run())

    def answer(self, operation: str, values: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Answer a GraphQL question."""
        name = values.get("name") or ""
        if operation == "UpsertBucket":
            if name in self.refused:
                return 403, {"errors": [{"message": f"permission denied for {name}"}]}
            run = self.run(name)
            if values.get("groupName"):
                run.fields |= values
            project = {"id": "p", "name": values.get("project"), "entity": {"id": "e", "name": "me"}}
            bucket = {"id": f"id-{name}", "name": name, "displayName": values.get("displayName"), "config": "{}"}
            bucket |= {"description": None, "sweepName": None, "project": project, "historyLineCount": len(run.history)}
            return 200, {"data": {"upsertBucket": {"bucket": bucket, "inserted": not run.history}}}
        if operation == "RunResumeStatus":
            known = self.runs.get(name)
            if name not in self.refused:
                self.run(name).opened += 1
            if known is None or not known.history:
                return 200, {"data": {"model": None}}
            last = known.history[max(known.history)]
            bucket = {
                "id": f"id-{name}",
                "name": name,
                "summaryMetrics": json.dumps(known.summary),
                "displayName": known.fields.get("displayName"),
                "config": "{}",
                "tags": [],
                "historyLineCount": len(known.history),
                "eventsLineCount": 0,
                "logLineCount": 0,
                "historyTail": json.dumps([json.dumps(last)]),
                "eventsTail": "[]",
                "wandbConfig": "{}",
            }
            return 200, {"data": {"model": {"id": "p", "name": "brain-it-bench", "bucket": bucket}}}
        if operation == "CreateRunFiles":
            run_id = values["run"]
            files = [{"name": file, "uploadUrl": f"{self.address}/put/{run_id}/{file}"} for file in values["files"]]
            return 200, {"data": {"createRunFiles": {"runID": run_id, "uploadHeaders": [], "files": files}}}
        if operation in _ARTIFACTS or not operation:
            return 200, {"data": self.artifact_answer(operation, values)}
        viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        return 200, {"data": {"viewer": viewer, "serverInfo": None, "model": None}}

    def artifact_answer(self, operation: str, values: dict[str, Any]) -> dict[str, Any]:
        """Answer a question about artifacts; the nameless ones ask for one by its name or id."""
        asked = values.get("input") or values
        if operation == "CreateArtifact":
            made = Artifact(
                f"artifact-{len(self.artifacts)}",
                asked["artifactCollectionName"],
                asked["artifactTypeName"],
                asked["runName"],
                json.loads(asked.get("metadata") or "{}"),
            )
            self.artifacts[made.id] = made
            artifact = {"id": made.id, "state": "PENDING", "artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if operation in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            of = values.get("artifactID") or values["artifactManifestID"]
            url = f"{self.address}/artifact/{of}/wandb_manifest.json"
            file = {"id": "f", "name": "m", "displayName": "m", "uploadUrl": url, "uploadHeaders": []}
            name = operation[0].lower() + operation[1:]
            return {name: {"artifactManifest": {"id": of, "file": file}}}
        if operation == "CreateArtifactFiles":
            nodes = [
                {
                    "node": {
                        "storagePath": file["name"],
                        "uploadUrl": f"{self.address}/artifact/{file['artifactID']}/{file['name']}",
                        "uploadHeaders": [],
                        "uploadMultipartUrls": None,
                        "artifact": {"id": file["artifactID"]},
                    }
                }
                for file in asked["artifactFiles"]
            ]
            return {"createArtifactFiles": {"files": {"edges": nodes}}}
        if operation == "CommitArtifact":
            self.artifacts[asked["artifactID"]].committed = True
            return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}}
        if operation == "UseArtifact" or {"artifactID", "runName"} <= set(asked):
            used = self.artifacts[asked["artifactID"]]
            self.run(asked["runName"]).uses.append(used.name)
            return {"useArtifact": {"artifact": _artifact(used)}}
        name = (values.get("name") or "").partition(":")[0]
        found = self.artifacts.get(values.get("id") or "") or next(
            (one for one in reversed(self.artifacts.values()) if one.name == name and one.committed), None
        )
        if "name" not in values:
            return {"artifact": found and _artifact(found)}
        member = found and {
            "__typename": "ArtifactCollectionMembership",
            "id": "m",
            "versionIndex": 0,
            "createdAt": "2026-01-01T00:00:00Z",
            "aliases": [],
            "artifactCollection": {**_COLLECTION, "name": found.name},
            "artifact": _artifact(found),
        }
        kind = found and {"artifactType": {"name": found.type}}
        return {"project": {"artifactCollectionMembership": member, "artifact": kind}}

    def stream(self, name: str, body: dict[str, Any]) -> None:
        """Take lines of a run's files."""
        run = self.run(name)
        for file, part in (body.get("files") or {}).items():
            lines = [json.loads(line) for line in part["content"]] if file != "output.log" else []
            if file == "wandb-history.jsonl":
                run.history |= {part["offset"] + index: line for index, line in enumerate(lines)}
            elif file == "wandb-summary.json":
                run.summary |= lines[-1]
        if body.get("complete"):
            run.exits.append(int(body.get("exitcode", 0)))


_ARTIFACTS = (
    "CreateArtifact",
    "CreateArtifactManifest",
    "UpdateArtifactManifest",
    "CreateArtifactFiles",
    "CommitArtifact",
    "UseArtifact",
)
_PROJECT = {"id": "p", "internalId": "p", "name": "brain-it-bench", "entity": {"name": "me"}}
_COLLECTION = {"__typename": "ArtifactSequence", "project": _PROJECT}


def _artifact(found: Artifact) -> dict[str, Any]:
    return {
        "__typename": "Artifact",
        "id": found.id,
        "artifactSequence": {**_COLLECTION, "name": found.name},
        "versionIndex": 0,
        "artifactType": {"name": found.type},
        "description": None,
        "metadata": json.dumps(found.metadata),
        "ttlDurationSeconds": -1,
        "ttlIsInherited": True,
        "tags": [],
        "historyStep": None,
        "state": "COMMITTED",
        "size": 0,
        "digest": "d",
        "commitHash": "c",
        "fileCount": 1,
        "createdAt": "2026-01-01T00:00:00Z",
        "updatedAt": None,
        "aliases": [],
    }


@contextlib.contextmanager
def fake_wandb() -> Iterator[FakeServer]:
    """Serve on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self._body()
            if self.path == "/graphql":
                question = json.loads(body)
                with server.lock:
                    code, told = server.answer(question.get("operationName") or "", question.get("variables") or {})
                self._send(code, told)
                return
            if self.path.endswith("/file_stream"):
                with server.lock:
                    server.stream(self.path.split("/")[-2], json.loads(body))
            self._send(200, {"exitcode": None, "limits": {}})

        def do_PUT(self) -> None:
            _, kind, of, name = self.path.split("?")[0].split("/", 3)
            with server.lock:
                files = server.artifacts[of].files if kind == "artifact" else server.run(of).files
                files[name] = self._body()
            self._send(200, {})

        def do_GET(self) -> None:
            self._send(200, {})

        def do_HEAD(self) -> None:
            self._send(404, None)

        def _body(self) -> bytes:
            parts = []
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
            else:
                parts.append(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            content = b"".join(parts)
            return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

        def _send(self, code: int, value: Any) -> None:
            content = b"" if value is None else json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that hangs up is no news."""

    with Server(("127.0.0.1", 0), Handler) as listening:
        server = FakeServer(f"http://127.0.0.1:{listening.server_port}")
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()
