"""Options of a command that follow from the fields of a spec.

The fields are read from the spec's source instead of the class, because importing it would load
pydantic and polars whenever a command, or only its help, is asked for. A test compares the two.
"""

import ast
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "tuple[str, ...]": list[str]}


def spec_fields(module: str, name: str) -> dict[str, tuple[Any, str, Any]]:
    """Field → (Python type, description, default) of the spec `name`, without importing `module`.

    Fields of other types than text, numbers, switches and lists of text are left out.
    """
    found = find_spec(module)
    assert found is not None
    assert found.origin is not None
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    [spec] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    fields = {}
    for node, after in zip(spec.body, [*spec.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            kind = ast.unparse(node.annotation).removesuffix(" | None")
            kind = "str" if kind.startswith("Literal[") or kind == "PositionsRule" else kind
            if kind in _TYPES:
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                text = str(after.value.value) if documented else ""  # type: ignore[union-attr]
                default = _default(node.value)
                fields[ast.unparse(node.target)] = _TYPES[kind], " ".join(text.split()), default
    return fields


def _default(value: ast.expr | None) -> Any:
    """The default of a field; None where there is none, or it is not written as a constant."""
    if isinstance(value, ast.Call):
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


def with_spec_options(
    module: str, name: str, helps: Mapping[str, str], skip: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add an option for every field of a spec to a command, which gets those given as `fields`.

    helps: help texts that replace a field's description. skip: fields that get no option.
    """
    fields = {field: one for field, one in spec_fields(module, name).items() if field not in skip}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {field: values.pop(field) for field in fields}
            command(**values, fields={k: v for k, v in given.items() if v not in (None, [])})

        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.name != "fields"]
        added = [_option(field, *one, helps.get(field)) for field, one in fields.items()]
        parameters = [*own[:3], *added, *own[3:]]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _option(
    field: str, kind: Any, description: str, default: Any, text: str | None
) -> inspect.Parameter:
    shown = ",".join(default) if isinstance(default, tuple) else default
    end = "" if default is None or kind is bool else f" [default: {shown}]."
    text = (text or description).removesuffix(".") + (end or ".")
    flag = "--" + field.replace("_", "-")
    option = typer.Option(flag, help=text) if kind is bool else typer.Option(help=text)
    annotation = Annotated[kind | None, option]
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(field, place, default=None, annotation=annotation)
