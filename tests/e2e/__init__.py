"""The whole path through a real Envoy."""
