"""A client for the models of this project, over tritonclient; synchronous, and free of torch.

    from client import Request, connect

    with connect("grpc", "127.0.0.1:8001") as server:
        for piece in server.generate(Request("17+25=", stream=True, max_tokens=8)):
            print(piece.text, end="", flush=True)

`Answer` puts the pieces together and times them. `python -m client --help` is the command line.
"""

from client.answer import Answer, Timing
from client.connection import connect
from client.errors import ClientError, Refused, TimedOut, Unreachable
from client.request import Message, Piece, Request
from client.transport import Protocol, Transport

__all__ = [
    "Answer",
    "ClientError",
    "Message",
    "Piece",
    "Protocol",
    "Refused",
    "Request",
    "TimedOut",
    "Timing",
    "Transport",
    "Unreachable",
    "connect",
]
