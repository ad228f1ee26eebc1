"""What every long-running process of ours does alike: logs, an event loop, cores, sockets, a gRPC server, and a small HTTP server beside it."""
