"""A small client of the Kubernetes API: list-then-watch, server-side apply, leader election by a Lease.

Over aiohttp and msgspec, which are here anyway, so that a router outside Kubernetes carries nothing for it. The packaged clients were measured and do not
watch as is needed here: none resumes by bookmarks and finds deletions by difference after a 410, and the typed models of most cost more per event than
the whole of what is done with it.
"""
