"""Extraction with a limit, which only another process can have: the parsers are C code that cannot be told to stop.

The process extracts one page after the other. Before each it asks the kernel to be killed when its processor time is over
(setitimer(2), ITIMER_PROF), so a page costs what it may, however busy the machine is. What a page breaks, by taking too long,
too much memory, or by an error of its parser, is only this process; a new one goes on with the next page.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import weakref
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING

from powerhouse.corpora.extract import extract
from powerhouse.errors import ClusterError

if TYPE_CHECKING:
    from powerhouse.corpora.document import Markup

_MAX_BYTES = 2**32
"""Address space of the process; the largest page that is read, of 10 MB, takes far less."""


class ExtractionError(Exception):
    """A page has no text to give: `reason` is timeout or failure."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Extractor:
    """Extracts in a process of its own, which starts with the first page and ends with this object."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._connection: Connection | None = None

    def __call__(self, markup: Markup, content: str) -> str:
        """Give the text of a page.

        Raises:
            ExtractionError: it took more than `timeout_s` seconds of processor time, or broke its parser.
        """
        if markup == "text":
            return extract(markup, content)
        connection = self._connection or self._start()
        try:
            connection.send((markup, content))
            is_text, answer = connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if not is_text:
            raise ExtractionError("failure", answer)
        return str(answer)

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        command = [sys.executable, "-m", __name__, str(theirs.fileno()), str(self._timeout_s)]
        # What Ray has put on this process' path, such as a job's working directory, may be where this package is.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
        theirs.close()
        self._connection, self._end = ours, weakref.finalize(self, _end, process, ours)
        with contextlib.suppress(EOFError):
            ours.recv()
            return ours
        raise ClusterError("the process that extracts text does not start", got=f"exit status {self._stop()}")

    def _stop(self) -> int:
        self._connection = None
        status = self._end()
        assert status is not None, "a process is ended once"
        return int(status)

    def _died(self) -> ExtractionError:
        status = self._stop()
        if status == -signal.SIGPROF:
            return ExtractionError("timeout", f"over {self._timeout_s:g} s")
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return ExtractionError("failure", f"the parser ended by {how}")


def _end(process: subprocess.Popen[bytes], connection: Connection) -> int:
    connection.close()
    process.terminate()
    return process.wait()


def main(connection: Connection, timeout_s: float) -> None:
    """Answer pages until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send("ready")
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            markup, content = connection.recv()
            signal.setitimer(signal.ITIMER_PROF, timeout_s)
            answer = _try(markup, content)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send(answer)


def _try(markup: Markup, content: str) -> tuple[bool, str]:
    try:
        return True, extract(markup, content)
    except Exception as error:  # the parsers have many of their own
        return False, f"{type(error).__name__}: {error}"[:200]


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), float(sys.argv[2]))
