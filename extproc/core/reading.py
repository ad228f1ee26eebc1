"""What was read in a body: which model it names, and where that name stands, so that another can be put there without a second look; and the prompt.

A large body is judged in another process, from memory that both processes map. Whatever reads one therefore takes a `Buffer`, and answers with
numbers instead of copies.
"""

from typing import NamedTuple

from .pieces import Buffer

MAX_MODEL_BYTES = 2048  # a 256-byte name spelled in JSON with six-byte escapes throughout has 1,538 with its quotes


class Reading(NamedTuple):
    """The verdict on a body that can be forwarded."""

    model: str | None  # None: the body names none
    begin: int = 0  # the model's value is `body[begin:end]`, a JSON string with its quotes; of the plain body, if that is another
    end: int = 0
    plain: Buffer | None = None  # the body as it was decoded; None where no encoding stood in between
    blocks: tuple[int, ...] = ()  # the hashes of the prompt's blocks, where they were asked for
