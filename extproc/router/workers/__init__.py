"""A router of several processes: one parent, which handles no request, and workers, each of which is a whole router without a port.

    Envoy ──connections──► parent ──each to one worker──► worker 0 ─┐
                             │                            worker 1 ─┼─► stagers, each with leases under its own name
    /metrics, control API ───┴──a Unix socket to each───► worker n ─┘

Why the parent accepts, and the workers do not share the port by SO_REUSEPORT: the kernel spreads connections by a hash of their addresses, and Envoy
opens one connection per thread. Of 500 times that two connections came to two such sockets, one socket got both in 258, and of 500 times four to four
each got one in 46; a worker without a connection is a core without work. The parent gives each connection to the worker with the fewest busy ones. With
SO_REUSEPORT a connection in the queue of a worker that dies is reset, too; here the parent keeps a copy until the worker has taken it.

- Connections that have become uneven, as after a worker's death, are moved: the worker with most of them sends GOAWAY on one, its client opens the next
  calls on a new connection, and the parent gives that to the worker with least. Calls that run end where they are.
- A worker that dies or falls silent is replaced: at once after a long life, with growing pauses after short ones. Its open calls are lost, nothing else.
- Limits of the settings are of the whole router: `board.py`. Judges of bodies are divided up, at least one for each worker.
- What a worker had counted is remembered when it dies: `sums.py`. The control API is answered by one worker, and a change is made in all: `front.py`.
- The parent's death kills the workers (prctl PR_SET_PDEATHSIG, and the end of the socket of their orders).
- Workers are started by exec and not by fork: nobody inherits a lock that a thread of the parent held.
"""
