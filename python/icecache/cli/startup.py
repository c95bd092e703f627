"""What a starting vLLM says: shown while all goes well; the reason alone where it does not start.

vLLM's processes each print the traceback of what stopped them, and those that wait for them print
their own: the line that matters is one of some two hundred.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

# uvicorn's last word before it answers.
_READY = "Application startup complete"
# "(EngineCore pid=12) ERROR 11-29 12:00:00 [core.py:1234] text": who, and what kind of a line.
_PREFIX = re.compile(r"^\([^()]+ pid=\d+\) ")
_HEAD = re.compile(r"^(DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]{8} \[[^\]]*\] ?")
_TRACEBACK = "Traceback (most recent call last):"
# "ValueError: text", "icecache.errors.InvalidArgument: text"; the dots of a module are left out.
_RAISED = re.compile(r"^(?:\w+\.)*(?P<kind>[A-Z]\w*): (?P<text>.*)")
# Processes that tell of another one's end.
_CONSEQUENCES = (
    "Engine core initialization failed",
    "Engine core proc",
    "WorkerProc initialization failed",
    "Executor failed",
    "Failed core proc",
    "cancelled",
)
# A process that was ended from outside.
_KILLED = re.compile(r"(?i)exit ?code:? -9|exitcode=-9|'EngineCore\w*': -9|sigkill")
# What a reader is told in vLLM's place: pattern of the reason, and text with its groups.
_EXPLAINED: tuple[tuple[str, str], ...] = (
    (
        r"Address already in use",
        "the port is in use by another server: give another one with --port",
    ),
    (
        r"Available memory on node \S+ \((?P<free>\S+)/\S+ GiB\).*"
        r"|No available memory for the cache blocks.*",
        "too little memory is free: {0}",
    ),
)
# What follows on a line that has these words.
_STAGES = (
    ("non-default args", "the engine's process starts, and imports them, too"),
    ("Initializing a V1 LLM engine", "the weights are read"),
    ("Loading weights took", "the model is set up"),
    ("Dynamo bytecode transform", "torch compiles the model, some minutes on a CPU"),
    ("IceCache: host", "the HTTP server starts"),
)


class Startup:
    """Lines of a server that starts go to `show`, but for those from its first error on.

    They are held back until the server is ready, or has ended, or `release()` lets them go.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self.ready = False
        self.stage = "vLLM's modules are imported"
        self.held: list[str] = []
        self._show = show

    def feed(self, line: str) -> None:
        """One line of the output, its end included."""
        if not self.ready and (self.held or _is_error(line)):
            self.held.append(line)
        else:
            self._show(line)
        for word, stage in _STAGES:
            if word in line:
                self.stage = stage
        if _READY in line:
            self.ready = True
            self.release()

    def release(self) -> None:
        """Shows what is held back."""
        for line in self.held:
            self._show(line)
        self.held.clear()

    def reason(self) -> str | None:
        """Why the server did not start, in one line; None where its output does not tell."""
        return reason(self.held)


def _is_error(line: str) -> bool:
    text = _PREFIX.sub("", line)
    return text.startswith(("ERROR ", "CRITICAL ", _TRACEBACK))


def reason(lines: Iterable[str]) -> str | None:
    """The first exception that is not about another process, as one line."""
    texts = [_text(line) for line in lines]
    in_traceback = False
    for index, text in enumerate(texts):
        in_traceback |= text == _TRACEBACK
        raised = _RAISED.match(text) if in_traceback else None
        if raised is None:
            continue
        in_traceback = False
        if not any(word in text for word in _CONSEQUENCES):
            return _explained(raised["kind"], _whole(raised["text"], texts[index + 1 :]))
    if any(_KILLED.search(text) for text in texts):
        return "a process of the server was killed: most likely the machine ran out of memory"
    return None


def _text(line: str) -> str:
    """Without who says it and when; nothing of lines that are no part of an error."""
    text = _PREFIX.sub("", line)
    head = _HEAD.match(text)
    if head is not None and head[1] not in ("ERROR", "CRITICAL"):
        return ""
    return _HEAD.sub("", text).rstrip()


def _whole(text: str, following: Iterable[str]) -> str:
    """A message and the indented lines that belong to it, as pydantic prints them."""
    parts = [text]
    for line in following:
        if not line.startswith("  ") or line.lstrip().startswith(("File ", "For further")):
            break
        parts.append(line.strip())
    return " ".join(parts)


def _explained(kind: str, text: str) -> str:
    for pattern, told in _EXPLAINED:
        found = re.search(pattern, text)
        if found:
            return told.format(found[0])
    return text if kind == "InvalidArgument" else f"{kind}: {text}"
