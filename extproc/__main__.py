"""`python -m extproc` is `lora-extproc`."""

from .cli import main

main()
