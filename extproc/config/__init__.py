"""Settings: one YAML file for all processes, loaded once and checked once. Each process is handed the group it needs.

Unknown keys are errors. Every complaint names its path and the bad value. The text below a field is its documentation: the README's table is
made of it (`lora-extproc settings`).

`values.py` has the kinds of values, and what a group is. A module per subject has that subject's groups: `discovery.py`, `pools.py`, `credentials.py`,
`router.py`, `origins.py`, `stager.py`, `envoy.py`. `settings.py` puts them together, and checks what concerns several; `read.py` makes settings of a
file, or complaints; `documentation.py` lists them all.
"""
