# SPDX-License-Identifier: Apache-2.0
"""Processes that are waited for together, where one fails and another does not hear."""

import signal
import socket
import subprocess
import sys
import threading

import pytest

from shared.runtime import children

# Stands in a collective that never ends, and hears no signal there.
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(600)
"""
HEARS = """
import time
print("here", flush=True)
time.sleep(600)
"""


def start(code: str) -> "subprocess.Popen[bytes]":
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline()
    return child


@pytest.mark.parametrize("is_asked_to_stop", [True, False])
def test_who_waits_for_one_that_is_gone_is_killed_after_its_grace(
    monkeypatch: pytest.MonkeyPatch, is_asked_to_stop: bool
) -> None:
    """Also after a stop: what waits for another can save nothing."""
    monkeypatch.setattr(children, "stop_requested", lambda: is_asked_to_stop)
    started = [start(HEARS), start(DEAF)]
    if not is_asked_to_stop:
        started[0].terminate()
    found: list[dict[int, int]] = []
    waiting = threading.Thread(
        target=lambda: found.append(children.wait_for_all(started, grace_s=0.1)), daemon=True
    )
    waiting.start()
    waiting.join(timeout=60)
    has_ended = not waiting.is_alive()
    started[1].kill()
    waiting.join()
    assert has_ended
    assert found == [{0: -signal.SIGTERM}]
    assert started[1].returncode == -signal.SIGKILL


def test_who_saves_after_a_stop_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "stop_requested", lambda: True)
    saved = start("import time; print(1, flush=True); time.sleep(0.5); raise SystemExit(143)")
    monkeypatch.setattr(children, "send", lambda *_: None)  # both have heard already
    saves = start("import time; print(1, flush=True); time.sleep(3); raise SystemExit(143)")
    assert set(children.wait_for_all([saved, saves], grace_s=0.0).values()) == {143}
    assert saves.returncode == 143


def test_a_port_that_is_held_is_the_servers_and_nobody_elses() -> None:
    with children.held_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        # With SO_REUSEADDR, as servers do.
        with (
            socket.create_server(("127.0.0.1", port)) as server,
            socket.create_connection(("127.0.0.1", port)) as client,
        ):
            answering, _ = server.accept()
            answering.sendall(b"here")
            answering.close()
            assert client.recv(4) == b"here"
