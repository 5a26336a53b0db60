#!/usr/bin/env -S python3 -IS
# SPDX-License-Identifier: Apache-2.0
"""A kubectl whose cluster is a folder: $CLUSTER/objects/<kind>-<name>.json, and what follows in time.

`script.json` there maps a Job's name to the statuses that successive `get`s see, the last of them for
ever, and `pods.json` a Job's name to its pods; `events.json` holds events. `away` in the folder makes the
API server unreachable.
Every command is kept in `commands.txt`.
"""

import json
import os
import sys
from pathlib import Path

CLUSTER = Path(os.environ["CLUSTER"])
OBJECTS = CLUSTER / "objects"


def read(name: str) -> dict:
    path = CLUSTER / name
    return json.loads(path.read_text()) if path.exists() else {}


def get(kind: str, *rest: str) -> str:
    if kind == "pods":
        job = rest[1].partition("=")[2]
        return json.dumps({"items": read("pods.json").get(job, [])})
    if kind == "events":
        return json.dumps(read("events.json"))
    name = rest[0]
    path = OBJECTS / f"{kind}-{name}.json"
    if not path.exists():
        return ""
    made = json.loads(path.read_text())
    seen = made.pop("seen", 0)
    statuses = read("script.json").get(name, [{}])
    made["status"] = (
        statuses[min(seen, len(statuses) - 1)] if "status" not in made else made["status"]
    )
    path.write_text(json.dumps({**json.loads(path.read_text()), "seen": seen + 1}))
    return json.dumps(made)


def apply() -> None:
    for made in json.load(sys.stdin)["items"]:
        path = OBJECTS / f"{made['kind'].lower()}-{made['metadata']['name']}.json"
        path.write_text(json.dumps(made))


def main(*words: str) -> None:
    with (CLUSTER / "commands.txt").open("a") as log:
        log.write(" ".join(words) + "\n")
    if words[0] == "--namespace":
        words = words[2:]
    if words[0] == "kustomize":
        sys.stdout.write((Path(words[1]) / "rendered.yaml").read_text())
        return
    if (CLUSTER / "away").exists():
        sys.exit("Unable to connect to the server: connection refused")
    if words[0] == "get":
        sys.stdout.write(get(*words[1:]))
    elif words[0] == "apply":
        apply()
    elif words[0] == "delete":
        (OBJECTS / f"{words[1]}-{words[2]}.json").unlink()
    elif words[0] == "logs":
        sys.stdout.write(f"the last words of {words[1]}\n")
    else:
        sys.exit(f"error: unknown command {words[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
