"""Which endpoints there are: sources that show each pool's endpoints as whole sets, and what makes one fleet of them.

A source never decides: it yields what it sees, or why it sees nothing. `belief.py` says how long its last good set outlives a failure, `merge.py` adds the
sources of a pool up, `discovery.py` runs them all and hands whole fleets on. A source of another kind is one module with a `Source`, its settings beside
the others in `config/discovery.py`, and its line in `sources.py`.
"""
