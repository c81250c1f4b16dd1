"""Modules that are loaded when they are first used."""

from importlib import import_module
from typing import Any


class LazyModule:
    """A stand-in for a module whose import takes seconds: loaded at the first use of a name in it.

    So a module can hold both a spec, which is read often, and the torch code that the spec
    configures. Write

        if TYPE_CHECKING:
            import torch
        else:
            torch = LazyModule("torch")
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self._name), attribute)
        setattr(self, attribute, value)  # the next use finds it without this method
        return value
