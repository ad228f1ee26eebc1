"""What a setting may be: addresses, times, sizes; and what all groups of settings have in common."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def host_port(value: str) -> str:
    """`value` itself. Raises ValueError where it is not host:port."""
    host, _, port = value.rpartition(":")
    if not host or "/" in host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError("is not host:port")
    return value


def _optional_address(value: str) -> str:
    return host_port(value) if value else value


def _addresses(value: str) -> str:
    for address in value.split(","):
        host_port(address.strip())
    return value


Address = Annotated[str, AfterValidator(host_port)]
Addresses = Annotated[str, AfterValidator(_addresses)]
OptionalAddress = Annotated[str, AfterValidator(_optional_address)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
