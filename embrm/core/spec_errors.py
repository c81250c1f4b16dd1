"""The line that tells a user what is wrong in a spec, from pydantic's report of it."""

import json
from typing import Any

from pydantic import BaseModel, ValidationError

from embrm.core.errors import nearest

ELSEWHERE = {
    "center_rewards_coefficient": "centering",
    "dataset_name": "data",
    "early_stopping_patience": "patience",
    "label_smoothing_factor": "label_smoothing",
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "model_name_or_path": "model",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_pairs",
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup",
}
"""Names that TRL and transformers give to keys of specs."""

_NEEDED = {
    "bool_parsing": "write true or false",
    "bool_type": "write true or false",
    "float_parsing": "write a number",
    "float_type": "write a number",
    "int_from_float": "write a whole number",
    "int_parsing": "write a whole number",
    "int_type": "write a whole number",
    "string_type": "write text, in quotes",
}
"""What to write instead, by pydantic's type of an error."""


def error_line(error: ValidationError, model: type[BaseModel]) -> str:
    """Field, value found, rule and remedy of the first thing to correct in the values of `model`.

    Unknown keys at the top come first, because they explain what seems to be missing there.
    """
    # A union reports its members' complaints too; the deepest path is the most specific one.
    details = max(error.errors(), key=_precedence)
    location = [str(part) for part in details["loc"]]
    field, kind = ".".join(location) or "spec", details["type"]
    owner = _model_at(model, details["loc"][:-1])
    if kind == "extra_forbidden":
        return f"unknown key {field!r}: {known_key(location[-1], owner)}"
    if kind == "missing":
        return f"{field} is missing: add it"
    if kind == "value_error" and not location:
        return _message(details)
    return f"{field} = {details['input']!r}: {_rule(details, owner)}"


def known_key(name: str, owner: type[BaseModel] | None) -> str:
    """The remedy clause for an unknown key of the table that `owner` describes."""
    if owner is None:
        return "remove it"
    known = ELSEWHERE.get(name)
    if known in owner.model_fields:
        return f"did you mean {known!r}?"
    return nearest(name, owner.model_fields)


def _precedence(details: Any) -> tuple[bool, int, bool]:
    unknown = details["type"] == "extra_forbidden"
    return unknown and len(details["loc"]) == 1, len(details["loc"]), unknown


def _message(details: Any) -> str:
    message: str = details["msg"].removeprefix("Value error, ")
    if message.startswith("Input should be "):
        return message.replace("Input should be", "must be", 1)
    return message[0].lower() + message[1:]


def _rule(details: Any, owner: type[BaseModel] | None) -> str:
    """What the value must be, in words that do not need pydantic."""
    kind, value = details["type"], details["input"]
    name = str(details["loc"][-1])
    field = owner.model_fields.get(name) if owner else None
    inner = _inner_model(field.annotation) if field else None
    default = None
    if field is not None and not field.is_required():
        default = field.get_default(call_default_factory=True)
    if kind in _NEEDED:
        shown = isinstance(default, int | float) and not isinstance(default, bool)
        return _NEEDED[kind] + (f", such as {name} = {json.dumps(default)}" if shown else "")
    if kind in ("tuple_type", "list_type"):
        if inner is not None or (field and "dict[" in str(field.annotation)):
            return f"write tables, [[{name}]]"
        example = json.dumps(default or [value], default=str)
        return f"write a list, such as {name} = {example}"
    if kind in ("too_short", "too_long"):
        limit = details["ctx"]["min_length" if kind == "too_short" else "max_length"]
        bound = "at least" if kind == "too_short" else "at most"
        return f"must have {bound} {limit} {'entry' if limit == 1 else 'entries'}"
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return "write a table" + _table_example(name, value, inner)
    if kind == "union_tag_not_found":
        return f"{details['ctx']['discriminator']} is missing in it: add it"
    if kind == "union_tag_invalid":
        return f"its kind must be one of {details['ctx']['expected_tags']}"
    return _message(details)


def _table_example(name: str, value: Any, inner: type[BaseModel] | None) -> str:
    """An example or the keys of the table that belongs where `value` was found."""
    if inner is None:
        return ""
    example = getattr(inner, "example", None)
    if example is None and "kind" in inner.model_fields and isinstance(value, str):
        example = f"{{ kind = {json.dumps(value)} }}"
    if example is not None:
        return f", such as {name} = {example}"
    return f" with keys of {', '.join(inner.model_fields)}"


def _model_at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model that owns the key at the end of `path`, walking nested models and tuples."""
    current: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return None
        if part not in current.model_fields:
            continue  # a union's tag, not a field
        current = _inner_model(current.model_fields[part].annotation)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _inner_model(argument)
        if found is not None:
            return found
    return None
