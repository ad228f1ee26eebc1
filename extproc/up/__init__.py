"""The whole system on one machine: a real Envoy, one router, and nodes that are a stager and an engine each."""
