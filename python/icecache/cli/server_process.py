"""A server in a process of its own: its output, its signals, its end.

The server is a child of this process, which lives as long as the server does: it hands signals on,
copies the output, and tells in one line why a server did not start.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from icecache.cli.startup import Startup
from icecache.errors import Error

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SILENT_SECONDS = 20  # until a starting server's stage is told again
# A server that does not start ends soon after its first error; past this, the error was none.
_HELD_SECONDS = 90
_PR_SET_PDEATHSIG = 1


def run_server(
    command: Sequence[str], environment: Mapping[str, str], say: Callable[[str], None], address: str
) -> int:
    """Runs the server to its end; its exit status, as a shell has it.

    `say` prints a line about the start, `address` is where the server answers. Raises Error with
    the reason where the server did not start.
    """
    started = time.monotonic()
    server = subprocess.Popen(
        command,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # Ctrl-C at a terminal reaches the server once, through this process.
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    asked_to_stop = False

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        server.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in _SIGNALS}
    try:
        startup = _copy_output(server, started, say, address)
        status = server.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status != 0 and not startup.ready and not asked_to_stop:
        reason = startup.reason()
        if reason is None:
            startup.release()
            reason = f"its messages are above (exit status {status})"
        raise Error(f"the server did not start: {reason}")
    startup.release()
    return 128 - status if status < 0 else status


def _end_with_parent() -> None:
    """In the child: it is told to end where this process is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Output:
    """This process' stdout; nothing more is written once nobody reads it."""

    def __init__(self) -> None:
        self._open = True

    def write(self, line: str) -> None:
        if not self._open:
            return
        try:
            os.write(sys.stdout.fileno(), line.encode(errors="surrogateescape"))
        except OSError:
            self._open = False


def _copy_output(
    server: subprocess.Popen[bytes], started: float, say: Callable[[str], None], address: str
) -> Startup:
    """Until all processes of the server have closed their output."""
    assert server.stdout is not None
    startup = Startup(_Output().write)
    pipe = server.stdout.fileno()
    rest = b""
    told = held = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=1):
                chunk = os.read(pipe, 1 << 16)
                if not chunk:
                    break
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    was_ready = startup.ready
                    startup.feed(line.decode(errors="surrogateescape") + "\n")
                    if startup.ready and not was_ready:
                        say(f"ready after {time.monotonic() - started:.0f} s: {address}")
            elif server.poll() is not None:
                break  # a process that outlived the server holds the pipe open
            now = time.monotonic()
            if not startup.held:
                held = now
            elif now - held > _HELD_SECONDS:
                startup.release()
            if not startup.ready and now - told > _SILENT_SECONDS:
                told = now
                say(f"{now - started:.0f} s: {startup.stage}")
    if rest:
        startup.feed(rest.decode(errors="surrogateescape"))
    return startup
