"""The node's directory: what is published in it, and what others put there."""
