"""The choice between the ways to a server."""

from client.transport import Address, Protocol, Transport


def connect(protocol: Protocol = "grpc", url: str | None = None) -> Transport:
    """A connection to a server, by default one on this host at Triton's port; use it in `with`.

    Raises:
        ValueError: `url` is not one.
        Unreachable: nothing answers there.
    """
    address = Address.parse(protocol, url)
    transport: Transport
    # Imported when needed: each brings its own network stack.
    if protocol == "grpc":
        from client.grpc_transport import GrpcTransport

        transport = GrpcTransport(address)
    else:
        from client.http_transport import HttpTransport

        transport = HttpTransport(address)
    transport.open()
    return transport
