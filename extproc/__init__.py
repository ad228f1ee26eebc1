"""Route LoRA requests inside Envoy to the node that has the adapter on disk, and put it there first."""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")  # before gRPC begins: its handlers abort a child between fork and exec, which needs no gRPC

__version__ = "0.1.0"
