"""A small HTTP/2 server for gRPC calls, on asyncio: the transport of the hot path.

grpc.aio costs ten times what the router itself does per request: a task, two event loops and several context switches for every message. Here a
frame that arrives is a method call, and what is answered leaves in one write. It speaks what a gRPC client needs (RFC 9113, and gRPC over HTTP/2) and
nothing else: no priorities, no push, no compression of messages. Whatever is not a POST of gRPC is answered 405 or 415 on its own stream.

`calls.py` is what the transport and a call owe each other, `frames.py` has the numbers, `headers.py` reads header blocks, `streams.py` says what a frame
may do to a stream and cuts bytes into messages, `outbox.py` writes, `patience.py` bounds what a peer may cost, `connection.py` puts them together.
"""
