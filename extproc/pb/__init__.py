"""Generated from protos/ by the command in protos/README.md; never edited."""
