"""Route LoRA requests inside Envoy to the node that has the adapter on disk, and put it there first."""

__version__ = "0.1.0"
