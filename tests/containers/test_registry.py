# SPDX-License-Identifier: Apache-2.0
"""That `up` asks no registry for our own images, seen by a stand-in that counts who calls."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.containers.conftest import CPU, IMAGES, Project

pytestmark = pytest.mark.container


class Registry:
    """Accepts connections on loopback, counts them and hangs up."""

    def __init__(self) -> None:
        self.calls = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.name = f"localhost:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                caller, _ = self._socket.accept()
                self.calls += 1
                caller.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def registry(images: dict[str, str]) -> Iterator[Registry]:
    registry = Registry()
    yield registry
    registry.close()


def project(registry: Registry) -> Project:
    return Project("eyrie-test-registry", "workspace", variables={"EYRIE_REGISTRY": registry.name})


def test_a_stage_is_built_and_never_asked_for(registry: Registry) -> None:
    ours = project(registry)
    try:
        created = ours.compose("up", "--no-start", *IMAGES)
        assert created.returncode == 0, created.stderr[-2000:]
        made = ours.compose("--profile", "*", "ps", "--all", "--services").stdout.split()
        assert sorted(made) == sorted(IMAGES)
        assert registry.calls == 0
    finally:
        ours.compose("--profile", "*", "down", "--volumes", "--rmi", "all")


def test_the_stand_in_would_be_called(registry: Registry) -> None:
    pulled = project(registry).compose("up", "--no-start", "ops", files=(*CPU, "compose/pull.yaml"))
    assert pulled.returncode != 0
    assert registry.calls > 0
