# SPDX-License-Identifier: Apache-2.0
"""A scripted Kubernetes API server on loopback: what a real kubectl asks, and no controller.

Objects live in memory. A test sets a Job's status, pods and events, as controllers would.
"""

import copy
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KINDS = {  # resource -> (group and version, kind)
    "configmaps": ("v1", "ConfigMap"),
    "events": ("v1", "Event"),
    "persistentvolumeclaims": ("v1", "PersistentVolumeClaim"),
    "pods": ("v1", "Pod"),
    "jobs": ("batch/v1", "Job"),
}
VERBS = ["create", "delete", "get", "list", "patch"]


def resources(version: str) -> dict[str, Any]:
    """What discovery says of a group."""
    named = [(name, kind) for name, (of, kind) in KINDS.items() if of == version]
    listed = [
        {
            "name": name,
            "singularName": kind.lower(),
            "namespaced": True,
            "kind": kind,
            "verbs": VERBS,
        }
        for name, kind in named
    ]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": listed}


GROUP = {"groupVersion": "batch/v1", "version": "v1"}
FIXED: dict[str, dict[str, Any]] = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [{"name": "batch", "versions": [GROUP], "preferredVersion": GROUP}],
    },
    "/api/v1": resources("v1"),
    "/apis/batch/v1": resources("batch/v1"),
}


class ApiServer(ThreadingHTTPServer):
    """Serves until it is closed; `objects` is (resource, name) -> object."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.refusals: dict[str, int] = {}  # resource -> HTTP status
        self.refused: list[str] = []  # resources, as they were asked for
        self.asked: list[str] = []  # the same, refused or not
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def put(self, resource: str, made: dict[str, Any]) -> None:
        version, kind = KINDS[resource]
        whole = {"apiVersion": version, "kind": kind, **copy.deepcopy(made)}
        whole["metadata"]["namespace"] = "eyrie"
        with self.lock:
            self.objects[resource, made["metadata"]["name"]] = whole

    def kubeconfig(self, folder: Path) -> Path:
        cluster = {"server": f"http://127.0.0.1:{self.server_address[1]}"}
        text = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": cluster}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {}}],
            "current-context": "c",
        }
        path = folder / "kubeconfig.json"
        path.write_text(json.dumps(text))
        return path


class Handler(BaseHTTPRequestHandler):
    """One request of kubectl's."""

    server: ApiServer

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, made: Any, status: int = 200) -> None:
        text = made.encode() if isinstance(made, str) else json.dumps(made).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def fail(self, status: int, reason: str, message: str) -> None:
        facts = {"code": status, "reason": reason, "message": message, "status": "Failure"}
        self.answer({"apiVersion": "v1", "kind": "Status", **facts}, status)

    def place(self) -> tuple[str, str, str, dict[str, list[str]]]:
        """(resource, name, subresource, query) of a path below a namespace."""
        url = urllib.parse.urlsplit(self.path)
        after = url.path.partition("/namespaces/")[2].split("/")[1:]
        resource, name, below = (*after, "", "", "")[:3]
        return resource, name, below, urllib.parse.parse_qs(url.query)

    def do_GET(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        if path in FIXED:
            return self.answer(FIXED[path])
        if (
            path == "/openapi/v2"
        ):  # an empty protobuf: kubectl knows no schema, and validates nothing
            return self.answer("")
        resource, name, below, query = self.place()
        self.server.asked.append(resource)
        if status := self.server.refusals.get(resource):
            self.server.refused.append(resource)
            reasons = {403: "Forbidden", 503: "ServiceUnavailable"}
            return self.fail(status, reasons[status], f"{resource}: the server says no")
        if below == "log":
            return self.answer(self.server.logs[name])
        with self.server.lock:
            if name and (resource, name) not in self.server.objects:
                return self.fail(404, "NotFound", f'{resource} "{name}" not found')
            if name:
                return self.answer(self.server.objects[resource, name])
            of_kind = [each for (of, _), each in self.server.objects.items() if of == resource]
        label, _, value = query.get("labelSelector", ["="])[0].partition("=")
        items = [
            each
            for each in of_kind
            if not label or each["metadata"].get("labels", {}).get(label) == value
        ]
        version, kind = KINDS.get(resource, ("v1", "Status"))
        return self.answer({"apiVersion": version, "kind": f"{kind}List", "items": items})

    def do_POST(self) -> None:
        made = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        resource = self.place()[0]
        made["metadata"] |= {"uid": f"{len(self.server.objects)}", "resourceVersion": "1"}
        self.server.put(resource, made)
        self.answer(made, 201)

    def do_PATCH(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        resource, name, *_ = self.place()
        self.answer(self.server.objects[resource, name])

    def do_DELETE(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        resource, name, *_ = self.place()
        with self.server.lock:
            self.answer(self.server.objects.pop((resource, name)))
