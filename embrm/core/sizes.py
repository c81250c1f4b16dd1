"""Sizes in bytes, as people write them."""

from pydantic import ByteSize, TypeAdapter, ValidationError

from embrm.core.errors import UserError

_SIZE = TypeAdapter(ByteSize)


def parse_bytes(name: str, text: str) -> int:
    """The number of bytes in text such as 4GB, 1.5GB or 800MB (units of 1,000; GiB: of 1,024).

    Raises: UserError, which calls the setting `name`, for anything else and for sizes below 1.
    """
    try:
        size = int(_SIZE.validate_python(text.strip()))
    except (ValidationError, OverflowError):
        size = 0
    if size < 1 or text.strip().isdigit():
        raise UserError(f"{name} {text!r}: write a number and MB, GB or TB, such as 4GB")
    return size
