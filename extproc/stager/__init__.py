"""One process per node: puts adapters into the node's directory, keeps it bounded, and tells routers what is there."""
