"""What others may ask of a node: gRPC for routers and peers, HTTP for operators."""
