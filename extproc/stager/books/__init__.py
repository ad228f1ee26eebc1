"""What a node knows without asking anybody: names, leases, readiness, changes. No I/O."""
