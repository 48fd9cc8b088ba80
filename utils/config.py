"""The machinery of configs: typed sections, settings in layers, errors of one line.

A section is a frozen pydantic model with one line a key: type, range, default, and where the default is from.

    class Train(Section):
        lr: NotNegative = key(6e-5, "paper")

`Layers` puts settings on top of each other (a method's defaults, YAML files, the command line), remembers where each
value is from, and gives the checked section. The keys themselves stand in engine/config.py, datasets/config.py and the
config.py of each method.
"""

import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal

import annotated_types as bounds
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from utils.errors import UserError, likeness, nearest
from utils.files import replacing

COMMAND_LINE = "on the command line"


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
    try:
        return OmegaConf.create(f"value: {value}").value if isinstance(value, str) else value
    except (yaml.YAMLError, OmegaConfBaseException):
        return value


Text = str
FilePath = Annotated[str, "path"]   # of a file or folder of this machine: `without_folders` cuts it down
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


class Layers:
    """Settings of several sources on top of each other, under one schema.

    values: what was set so far, nested; sources: by dotted key, the source of each value that is not a default.
    """

    def __init__(self, schema: type[Section], renamed: Mapping[Any, Any] | None = None) -> None:
        """renamed: former names of keys, for the error about one that is unknown."""
        self.schema, self.renamed, self.values, self.sources = schema, renamed or {}, {}, {}

    def add(self, layer: Mapping, source: str) -> None:
        """Puts a mapping of settings on top. Raises UserError for a key that the schema does not have."""
        self._merge(self.values, _nulls(layer), self.schema, "", source)

    def resolve(self) -> Section:
        """The checked section. Raises UserError for a value of another type or range than its key's."""
        try:
            return self.schema.model_validate(self.values)
        except ValidationError as error:
            raise UserError(self._line(error.errors()[0])) from None

    def described(self, config: Section) -> Iterator[tuple[str, Any, str]]:
        """(dotted key, value, source) of every key of the resolved config."""
        for name, value in leaves(config.model_dump(mode="json")):
            origin = next((self.sources[part] for part in _upwards(name) if part in self.sources), None)
            yield name, value, origin or f"default ({_find(self.schema, name)[0].description})"

    def _merge(self, into: dict, layer: Mapping, schema: type[Section], prefix: str, source: str) -> None:
        for name in layer:
            if name not in schema.model_fields:
                raise UserError(unknown_key(f"{prefix}{name}", source, self.schema, self.renamed))
            self._reset_others(name, into, layer, schema, prefix, source)
        for name, value in layer.items():
            full, field = f"{prefix}{name}", schema.model_fields[name]
            if section_of(field) and not isinstance(value, Mapping):
                raise UserError(f"{full} = {value} {source}: expected a mapping of keys to values")
            if section_of(field):
                self._merge(into.setdefault(name, {}), value, section_of(field), f"{full}.", source)
                continue
            if isinstance(value, Mapping) and isinstance(into.get(name, field.default), Mapping):
                self.sources |= {f"{full}.{one}": source for one in value}
                value = {**into.get(name, field.default), **value}
            else:
                self.sources[full] = source
            into[name] = value

    def _reset_others(
        self, name: str, into: dict, layer: Mapping, schema: type[Section], prefix: str, source: str
    ) -> None:
        """Where the layer changes the key `name`: what other keys become by that, before the layer's own values."""
        field = schema.model_fields[name]
        if layer[name] == into.get(name, field.default):
            return
        for other, reset in _resets(field).items():
            known, named = into.get(other, schema.model_fields[other].default), layer.get(other, {})
            if known != reset and isinstance(named, Mapping):
                into[other] = reset
                self.sources[f"{prefix}{other}"] = f"{source}, with {name}"

    def _line(self, error: dict) -> str:
        """One line for an error of pydantic."""
        names = [str(part) for part in error["loc"]]
        names += error["ctx"]["key"].split(".") if error["type"] == "refused" else []
        while len(names) > 1 and _find(self.schema, ".".join(names)) is None:   # the number of an element of a list
            names.pop()
        full, value = ".".join(names), self.values
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else value
        source = next((self.sources[part] for part in _upwards(full) if part in self.sources), "by default")
        expected = error["ctx"]["expected"] if error["type"] == "refused" else expected_of(self.schema, full)
        return f"{full} = {shown(value)} {source}: expected {expected}"


def leaves(mapping: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; an empty mapping counts as a leaf."""
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def nested(full: str, value: Any) -> dict:
    """'a.b', 1 -> {'a': {'b': 1}}."""
    for part in reversed(full.split(".")):
        value = {part: value}
    return value


def merged(first: Mapping, second: Mapping) -> dict:
    """Both mappings, nested; what both name is the second's."""
    result = dict(first)
    for name, value in second.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both else value
    return result


def read_yaml(path: Path) -> dict:
    """A config file, its scalars as the texts they were written as. Raises UserError."""
    try:
        OmegaConf.load(path)   # refuses keys that stand there twice, which yaml does not
        content = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {_one_line(error)}") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"config file {path} holds no mapping of keys to values")
    return content or {}


def read_overrides(items: Sequence[str], schema: type[Section]) -> dict:
    """['a.b=1', ...] -> one nested mapping, in which the last of a key counts. Texts stay as they were typed."""
    result: dict = {}
    for item in items:
        full, equals, text = item.partition("=")
        if not equals or not all(full.split(".")):
            raise UserError(f"'{item}' {COMMAND_LINE} is not key=value")
        if not text:
            raise UserError(f"{full}= {COMMAND_LINE} has no value; write {full}=null for none")
        found = _find(schema, full)
        value: Any = text
        if text[0] in "[{" and not (found and _is_text(found[1])):
            try:
                value = yaml.load(text, yaml.BaseLoader)
            except yaml.YAMLError as error:
                raise UserError(f"{full}={text} {COMMAND_LINE} cannot be read: {_one_line(error)}") from error
        result = merged(result, nested(full, value))
    return result


def without_folders(config: Section) -> dict:
    """The config as plain values; of a `FilePath` that is absolute or from a home or outside, the last part stays."""
    values = {}
    for full, value in leaves(config.model_dump(mode="json")):
        found = _find(type(config), full)
        if found and "path" in _metadata(found[1]) and isinstance(value, str):
            outside = value.startswith(("/", "~", "..")) or PureWindowsPath(value).drive
            value = PureWindowsPath(value).name if outside else value
        values = merged(values, nested(full, value))
    return values


def save_yaml(values: Mapping, path: str | os.PathLike) -> None:
    """Writes plain values as YAML, which `read_yaml` gives back."""
    with replacing(path) as part:
        part.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), encoding="utf-8")


def unknown_key(full: str, source: str, schema: type[Section], renamed: Mapping[Any, Any]) -> str:
    """The line about a key that the schema does not have, with the known one most like it."""
    if full in renamed:
        return f"unknown key '{full}' {source}: its name is {renamed[full]} now"
    known = [name for name, _, _ in keys(schema)]
    full = full.lstrip("-")
    last = full.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    if "." in full or same:
        near = nearest(full, same or known)
    else:
        near = max(known, key=lambda name: likeness(full, name.rpartition(".")[2]))
    return f"unknown key '{full}' {source}: did you mean '{near}'?"


def keys(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, Any, FieldInfo]]:
    """(dotted key, type with its bounds, field) of every key."""
    hints = typing.get_type_hints(schema, include_extras=True)
    for name, field in schema.model_fields.items():
        section = section_of(field)
        if section:
            yield from keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hints[name], field


def section_of(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def expected_of(schema: type[Section], full: str) -> str:
    """What a key takes, in words: 'an integer, at least 1, or null'."""
    found = _find(schema, full)
    return _words(found[1]) if found else "a mapping of keys to values"


def _find(schema: type[Section], full: str) -> tuple[FieldInfo, Any] | None:
    """(field, type) of a dotted key, that of the whole value for a key inside a free mapping; None: no such key."""
    section: type[Section] | None = schema
    field, hint = None, None
    for name in full.split("."):
        if section is None and _is_mapping(hint):
            hint = typing.get_args(_bare(hint))[1]
            continue
        if section is None or name not in section.model_fields:
            return None
        field, hint = section.model_fields[name], typing.get_type_hints(section, include_extras=True)[name]
        section = section_of(field)
    return field, hint


def _words(hint: Any) -> str:
    """A type with its bounds, in words."""
    base, notes = _bare(hint), _metadata(hint)
    if typing.get_origin(base) in (typing.Union, types.UnionType):
        return " or ".join([_words(part) for part in typing.get_args(base) if part is not type(None)] + ["null"])
    if typing.get_origin(base) is Literal:
        return " or ".join(typing.get_args(base))
    if typing.get_origin(base) is tuple:
        parts = typing.get_args(base)
        if Ellipsis in parts:
            return f"a list, each element {_words(parts[0])}"
        return f"a list of {len(parts)}, each {_words(parts[0])}"
    if _is_mapping(base) or (isinstance(base, type) and issubclass(base, Section)):
        return "a mapping of keys to values"
    word = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}[base]
    low = next((note.ge for note in notes if isinstance(note, bounds.Ge)), None)
    high = next((note.le for note in notes if isinstance(note, bounds.Le)), None)
    above = next((note.gt for note in notes if isinstance(note, bounds.Gt)), None)
    if above is not None:
        return f"{word} above {above:g}"
    if low is None:
        return word
    return f"{word}, at least {low:g}" if high is None else f"{word}, {low:g} to {high:g}"


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _metadata(hint: Any) -> list:
    """What is annotated to a type, also inside `| None`."""
    if typing.get_origin(hint) is Annotated:
        notes = typing.get_args(hint)[1:]
        return [one for note in notes for one in (note.metadata if isinstance(note, FieldInfo) else [note])]
    return [note for part in typing.get_args(hint) for note in _metadata(part)] if _is_optional(hint) else []


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_text(hint: Any) -> bool:
    parts = typing.get_args(hint) if _is_optional(hint) else (hint,)
    return any(_bare(part) is str for part in parts)


def _is_mapping(hint: Any) -> bool:
    return typing.get_origin(_bare(hint)) is dict


def _resets(field: FieldInfo) -> dict[str, Any]:
    return (field.json_schema_extra or {}).get("resets", {})


def _upwards(full: str) -> Iterator[str]:
    """'a.b.c' -> 'a.b.c', 'a.b', 'a'."""
    parts = full.split(".")
    return (".".join(parts[:count]) for count in range(len(parts), 0, -1))


def _nulls(value: Any) -> Any:
    """What YAML writes for nothing as None."""
    if isinstance(value, Mapping):
        return {name: _nulls(one) for name, one in value.items()}
    return None if isinstance(value, str) and value.lower() in ("null", "~", "") else value


def shown(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return {None: "null"}.get(value, str(value)) if value is None or isinstance(value, str) else str(value).lower()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
