"""The connection between a pipeline's driver and a stage: TCP, authenticated both ways, messages in msgpack.

Its end is how each side learns that the other is gone: at once when a process dies, after half a minute without a sign of
life when a machine or the network does.
"""

from __future__ import annotations

import os
import socket
import struct
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge

import msgpack

_HANDSHAKE_TIMEOUT_S = 5
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


def connect(address: tuple[str, int], secret: bytes) -> Connection:
    """Open a connection to who listens at `address` and knows the secret."""
    connection = Client(address, authkey=secret)
    with socket_of(connection) as channel:
        _set_options(channel)
    return connection


def accept(server: socket.socket, secret: bytes) -> Connection | None:
    """Let in who knows the secret; whoever else knocks is turned away (None), and cannot keep the door busy."""
    channel, _ = server.accept()
    _set_options(channel)
    _set_receive_timeout(channel, _HANDSHAKE_TIMEOUT_S)
    connection = Connection(channel.detach())
    try:
        deliver_challenge(connection, secret)
        answer_challenge(connection, secret)
    except (AuthenticationError, EOFError, OSError):
        connection.close()
        return None
    with socket_of(connection) as channel:
        _set_receive_timeout(channel, 0)
    return connection


def send(connection: Connection, kind: str, value: object) -> None:
    connection.send_bytes(msgpack.packb((kind, value)))


def receive(connection: Connection) -> tuple[str, object]:
    kind, value = msgpack.unpackb(connection.recv_bytes())
    return kind, value


def socket_of(connection: Connection) -> socket.socket:
    """Another handle of the connection's socket, to be closed by the caller."""
    return socket.socket(fileno=os.dup(connection.fileno()))


def _set_options(channel: socket.socket) -> None:
    channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # macOS has the first under another name
            channel.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _set_receive_timeout(channel: socket.socket, timeout_s: int) -> None:
    """Bound each read; 0 takes the bound off."""
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", timeout_s, 0))
