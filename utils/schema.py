"""Typed sections of a config: one line for each key, with its type, range, default, and where the default is from.

    class Train(Section):
        lr: NotNegative = key(6e-5, "paper")
"""

import re
import types
import typing
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Annotated, Any, Literal, NamedTuple

import annotated_types as bounds
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

SCALAR = re.compile(r"""(["']?)[\w .+:~-]{0,200}\1""")   # no escapes, aliases, tags or references to the environment


class FrozenDict(dict):
    """A dictionary that cannot be changed."""

    def _refuse(self, *_: Any) -> None:
        raise TypeError("a config is not changed once it is resolved")

    __setitem__ = __delitem__ = update = pop = clear = setdefault = popitem = _refuse

    def __reduce__(self) -> tuple:
        return FrozenDict, (dict(self),)


def _flag(value: Any) -> Any:
    return {"true": True, "false": False}.get(str(value).lower(), "neither")   # not YAML's yes, on or 1


def _as_yaml(value: Any) -> Any:
    """The texts of a free mapping as YAML reads them: 6, 0.5, true."""
    if isinstance(value, Mapping):
        return {key: _as_yaml(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_as_yaml(one) for one in value]
    if not isinstance(value, str) or not SCALAR.fullmatch(value):
        return value
    try:
        return OmegaConf.create(f"value: {value}").value
    except (yaml.YAMLError, OmegaConfBaseException):
        return value


def file_name(path: str) -> str:
    """The last part of a path that is absolute, from a home or from outside; any other as it is."""
    outside = path.startswith(("/", "~", "..")) or PureWindowsPath(path).drive
    return PureWindowsPath(path).name if outside else path


Text = str
FilePath = Annotated[str, file_name]   # of a file or folder of this machine
Flag = Annotated[bool, BeforeValidator(_flag)]
Index = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Scales = Annotated[tuple[Positive, ...], Field(min_length=1)]
ScalesOf = Annotated[dict[str, Scales], AfterValidator(FrozenDict)]                        # by the kind of map
Free = Annotated[dict[str, Any], BeforeValidator(_as_yaml), AfterValidator(FrozenDict)]   # any keys


class Section(BaseModel):
    """A mapping of keys; unknown ones are refused, none is changed later. Iterating gives (key, value)."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    def refuse(self, name: str, expected: str) -> typing.NoReturn:
        """For validators: the value of the key `name`, dotted from here, does not fit the others."""
        raise PydanticCustomError("refused", "{expected}", {"key": name, "expected": expected})


def key(default: Any, source: str, resets: Mapping[str, Any] | None = None) -> Any:
    """A key of a section. source: where the default is from.

    resets: what other keys of the section become where a layer changes this one; what it says of them comes on top.
    """
    return Field(default, description=source, json_schema_extra={"resets": dict(resets or {})})


class Key(NamedTuple):
    """type: with its bounds. resets: by dotted key."""

    type: Any
    default: Any
    source: str
    resets: dict[str, Any]


def keys(schema: type[Section], prefix: str = "") -> dict[str, Key]:
    """Every key, dotted."""
    hints, found = typing.get_type_hints(schema, include_extras=True), {}
    for name, field in schema.model_fields.items():
        if isinstance(field.default, Section):
            found |= keys(type(field.default), f"{prefix}{name}.")
        else:
            resets = {f"{prefix}{other}": value for other, value in field.json_schema_extra["resets"].items()}
            found[f"{prefix}{name}"] = Key(hints[name], field.default, field.description, resets)
    return found


def in_words(hint: Any) -> str:
    """What a type takes: 'an integer, at least 1 or null'."""
    base, notes = _bare(hint), notes_of(hint)
    origin, parts = typing.get_origin(base), typing.get_args(base)
    if origin in (typing.Union, types.UnionType):
        return " or ".join([in_words(part) for part in parts if part is not type(None)] + ["null"])
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin is tuple:
        many = "a list, each element" if Ellipsis in parts else f"a list of {len(parts)}, each"
        return f"{many} {in_words(parts[0])}"
    if origin is dict:
        return "a mapping of keys to values"
    word = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}[base]
    low, high, above = (
        next((getattr(note, name) for note in notes if isinstance(note, kind)), None)
        for name, kind in (("ge", bounds.Ge), ("le", bounds.Le), ("gt", bounds.Gt))
    )
    if above is not None:
        return f"{word} above {above:g}"
    return word if low is None else f"{word}, at least {low:g}" if high is None else f"{word}, {low:g} to {high:g}"


def notes_of(hint: Any) -> list:
    """What is annotated to a type, also inside `| None`."""
    if typing.get_origin(hint) is Annotated:
        notes = typing.get_args(hint)[1:]
        return [one for note in notes for one in (note.metadata if isinstance(note, FieldInfo) else [note])]
    return [note for part in _parts(hint) if part is not hint for note in notes_of(part)]


def is_text(hint: Any) -> bool:
    return any(_bare(part) is str for part in _parts(hint))


def values_of(hint: Any) -> Any:
    """The type of the values of a mapping, None for other types."""
    return typing.get_args(_bare(hint))[1] if typing.get_origin(_bare(hint)) is dict else None


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _parts(hint: Any) -> tuple:
    """The types of a union, else the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
