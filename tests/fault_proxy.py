"""A proxy before an HTTP server that breaks what a test asks it to break.

It reads heads and passes bodies on as they come, one connection per request, so signatures and
chunks stay as they were::

    with FaultProxy("127.0.0.1", port) as proxy:
        proxy.fail("GET .*weights", "truncate:100", times=2)
        ...
        assert proxy.log == [...]            # the requests that were made

Faults: a status such as ``503``; ``reset`` before anything is done; ``cut`` in the middle of the
request; ``lose``: done, but the answer is lost; ``truncate:N`` bytes into the answer's body;
``delay:SECONDS``.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from dataclasses import dataclass

_BLOCK = 1 << 16
_MIDDLE_SECONDS = 0.2
"""A request without a body, or whose body waits to be asked for, is cut after so long."""
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>stub</Message></Error>"


@dataclass
class _Rule:
    pattern: re.Pattern[str]
    fault: str
    left: int


class FaultProxy:
    """The proxy, in a thread of its own."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = host, port
        self._rules: list[_Rule] = []
        self.log: list[str] = []
        """First lines of the requests that came: ``GET /bucket/key HTTP/1.1``."""
        self.url = ""

    def fail(self, pattern: str, fault: str, times: int = 1) -> None:
        """Let the next requests whose first line holds a pattern meet a fault."""
        self._rules.append(_Rule(re.compile(pattern), fault, times))

    def heal(self) -> None:
        """Let everything pass; forget what came so far."""
        self._rules.clear()
        self.log.clear()

    def __enter__(self) -> FaultProxy:
        ready = threading.Event()

        async def serve() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.url = "http://127.0.0.1:{1}".format(*server.sockets[0].getsockname())
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            ready.set()
            await self._stop.wait()
            server.close()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()))
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _take(self, line: str) -> str:
        """Return the fault of a request; it counts as met."""
        self.log.append(line)
        for rule in self._rules:
            if rule.left and rule.pattern.search(line):
                rule.left -= 1
                return rule.fault
        return ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one request, then close."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            fault, _, value = self._take(head.split(b"\r\n")[0].decode()).partition(":")
            if fault == "delay":
                await asyncio.sleep(float(value))
            if fault == "reset":
                _reset(writer)
            elif fault.isdigit():
                answer = f"HTTP/1.1 {fault} stub\r\nContent-Length: {len(_SLOW_DOWN)}\r\n"
                writer.write(f"{answer}Connection: close\r\n\r\n".encode() + _SLOW_DOWN)
                await writer.drain()
            else:
                await self._pass_on(head, reader, writer, fault, int(value or 0))
        writer.close()

    async def _pass_on(
        self,
        head: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        fault: str,
        size: int,
    ) -> None:
        above, up = await asyncio.open_connection(*self._upstream)
        lines = [ln for ln in head.split(b"\r\n") if not ln.lower().startswith(b"connection:")]
        up.write(b"\r\n".join([lines[0], b"Connection: close", *lines[1:]]))
        if fault in ("cut", "lose") and b"100-continue" in head.lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # the body waits for that
        body = asyncio.create_task(_pump(reader, up, 1 if fault == "cut" else None))
        if fault == "cut":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(body, _MIDDLE_SECONDS)
            _reset(writer)
        elif fault == "lose":
            await above.read()
            _reset(writer)
        elif fault == "truncate":
            answer = await above.readuntil(b"\r\n\r\n")
            writer.write(answer + await above.readexactly(size))
            await writer.drain()
        else:
            await _pump(above, writer, None)
        body.cancel()
        up.close()


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int | None
) -> None:
    """Pass blocks on until the end, or ``most`` of them."""
    while most != 0 and (block := await reader.read(_BLOCK)):
        writer.write(block)
        await writer.drain()
        most = None if most is None else most - 1


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection so that the other side gets an error, not an end."""
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
