"""Where adapters come from: origins and peers, and how their bytes arrive."""
