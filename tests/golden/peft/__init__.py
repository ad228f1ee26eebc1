"""Small adapters that PEFT itself wrote, each with the verdict of a real vLLM beside it: what the stager's check and the simulated engine are held to.

`python -m tests.golden.peft.make` writes them anew, `python -m tests.golden.peft.judge` asks a real vLLM about each and writes `verdicts.json`. Both run
under a Python that has vLLM and what `requirements.txt` names; the tests need neither.
"""
