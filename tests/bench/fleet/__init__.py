"""A fleet in simulated time, around the router's own core: which rule chooses how well. `python -m tests.bench.fleet`."""
