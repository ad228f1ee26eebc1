"""What a parent tells its workers."""

from enum import Enum


class Order(Enum):
    """One byte each, so that none is ever read in part."""

    TAKE = b"t"  # the connection that comes with it
    GIVE_ONE_AWAY = b"g"
    READY = b"r"
    NOT_READY = b"n"
    DRAIN = b"d"
