"""Values in, values out: no asyncio, no files, no clock, no log, no protobuf. Beyond the standard library only mmh3 and msgspec, used as functions."""
