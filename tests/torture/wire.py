"""One connection of the chaos server: reads honest requests, writes whatever it is told, and can end in any way."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from dataclasses import dataclass

LONGEST_WAIT = 30.0  # no client of ours waits so long: one that does shows in the journal
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A request as it came; header names are in lower case."""

    path: str
    headers: dict[str, str]
    body: bytes


class Wire:
    """A connection. Whatever is sent to a client that left raises `ConnectionError`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        # `drain` returns when the kernel has taken everything. Under TLS it waits from so many bytes on, else for more:
        # a limit of 0 would have it wait under TLS although nothing is left, until the client does something or leaves.
        self._writer.transport.set_write_buffer_limits(1 if writer.get_extra_info("sslcontext") else 0, 0)
        host, port = writer.get_extra_info("peername")[:2]
        self.peer = f"{host}:{port}"
        self.is_open = True
        self.sent_bytes = 0
        self.requests = 0

    async def read_request(self) -> Incoming | None:
        """Return the next request; None when the client left."""
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            request, *lines = head.rstrip().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            body = await self._reader.readexactly(int(headers.get("content-length", 0)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self.requests += 1
        self.sent_bytes = 0
        return Incoming(path=request.split(" ")[1], headers=headers, body=body)

    async def send(self, data: bytes) -> None:
        """Send bytes; returns when the kernel has taken them all."""
        if self._writer.transport.is_closing():
            raise ConnectionResetError("the client left")
        self._writer.write(data)
        await self._writer.drain()
        self.sent_bytes += len(data)

    async def drip(self, data: bytes, pause: float) -> None:
        """Send bytes one at a time, until the client leaves or `LONGEST_WAIT` is over."""
        for index in range(min(len(data), int(LONGEST_WAIT / pause))):
            await self.send(data[index : index + 1])
            await asyncio.sleep(pause)

    async def wait_left(self) -> None:
        """Do nothing until the client leaves, `LONGEST_WAIT` at most; then leave as well."""
        try:
            async with asyncio.timeout(LONGEST_WAIT):
                while await self._reader.read(65_536):
                    pass
        except (TimeoutError, ConnectionError):
            pass
        self.close()

    async def leave(self) -> None:
        """End if that was not done yet, and wait until it is; cancelled, it ends at once."""
        self.close()
        try:
            await self._writer.wait_closed()
        except (ConnectionError, ssl.SSLError, TimeoutError):
            pass
        finally:
            self._writer.transport.abort()

    def close(self) -> None:
        """End in order: FIN."""
        self.is_open = False
        self._writer.close()

    def reset(self) -> None:
        """End at once: RST."""
        self.is_open = False
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._writer.transport.abort()
