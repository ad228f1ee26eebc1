"""A small engine that does what vLLM does wherever this project depends on it, and dies where vLLM dies."""
