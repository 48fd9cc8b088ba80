"""Settings in layers: YAML files and key=value, put on top of each other under a schema (utils/schema.py).

Settings are flat here, values by dotted key. Scalars of YAML files and of the command line stay the texts they were
written as until the schema gives them a type.
"""

import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from utils.errors import UserError, likeness, nearest
from utils.files import replacing
from utils.schema import Section, file_name, in_words, is_text, keys, notes_of, values_of

COMMAND_LINE = "on the command line"
LARGEST, MOST, DEEPEST = 1 << 20, 100_000, 50   # of a YAML text: characters; values, what aliases repeat too; levels
KINDS = ("bool", "float", "int", "map", "merge", "null", "seq", "str", "timestamp", "value")
TAGS = {f"tag:yaml.org,2002:{name}" for name in KINDS}


class Layers:
    """Settings of several sources on top of each other, under one schema.

    values: what was set so far; sources: where each value is from that is not a default.
    """

    def __init__(self, schema: type[Section], renamed: Mapping[Any, Any] | None = None) -> None:
        """renamed: former names of keys, for the error about one that is unknown."""
        self.schema, self.renamed, self.keys = schema, renamed or {}, keys(schema)
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}

    def add(self, settings: Mapping[str, Any], source: str) -> None:
        """Puts settings on top. Raises UserError for a key that the schema does not have."""
        given: dict[str, Any] = {}
        for full, value in settings.items():
            owner = self._owner(full)
            if value == {} and owner is None and any(name.startswith(f"{full}.") for name in self.keys):
                continue   # a section without a key
            if owner is None or (owner != full and values_of(self.keys[owner].type) is None):
                raise UserError(self._unknown(full, value, source))
            inside = unflatten({full.removeprefix(f"{owner}."): value}) if owner != full else None
            given[owner] = value if inside is None else {**given.get(owner, {}), **inside}
        given = {full: _null(value) for full, value in given.items()}
        for full, value in given.items():
            if "${" in str(value):
                raise UserError(f"{full} = {shown(value)} {source}: references such as ${{...}} are not resolved")
        for full in [full for full, value in given.items() if value != self._known(full)]:
            for other, reset in self.keys[full].resets.items():
                if self._known(other) != reset and isinstance(given.get(other, {}), Mapping):
                    self.values[other], self.sources[other] = reset, f"{source}, with {full.rpartition('.')[2]}"
        for full, value in given.items():
            if isinstance(value, Mapping) and isinstance(self._known(full), Mapping):
                self.sources |= {f"{full}.{one}": source for one in value}
                value = {**self._known(full), **value}
            else:
                self.sources[full] = source
            self.values[full] = value

    def add_overrides(self, items: Sequence[str]) -> None:
        """Puts key=value pairs of the command line on top; texts stay as they were typed. Raises UserError."""
        texts = {full for full, declared in self.keys.items() if is_text(declared.type)}
        self.add(read_overrides(items, texts), COMMAND_LINE)

    def resolve(self) -> Section:
        """The checked section. Raises UserError for a value of another type or range than its key's."""
        try:
            return self.schema.model_validate(unflatten(self.values))
        except ValidationError as error:
            raise UserError(self._line(error.errors()[0])) from None

    def described(self, config: Section) -> Iterator[tuple[str, Any, str]]:
        """(key, value, source) of every key of the resolved config."""
        for full, value in flatten(config.model_dump(mode="json")).items():
            yield full, value, self._source(full) or f"default ({self.keys[self._owner(full)].source})"

    def _known(self, full: str) -> Any:
        return self.values.get(full, self.keys[full].default)

    def _owner(self, full: str) -> str | None:
        """The key that `full` is, or in whose mapping it is."""
        return next((part for part in _upwards(full) if part in self.keys), None)

    def _source(self, full: str) -> str | None:
        return next((self.sources[part] for part in _upwards(full) if part in self.sources), None)

    def _unknown(self, full: str, value: Any, source: str) -> str:
        """The line about a key that the schema does not have, with the known one most like it."""
        if any(name.startswith(f"{full}.") for name in self.keys):
            return f"{full} = {shown(value)} {source}: expected a mapping of keys to values"
        if full in self.renamed:
            return f"unknown key '{full}' {source}: its name is {self.renamed[full]} now"
        full = full.lstrip("-")
        same = [name for name in self.keys if name.rpartition(".")[2] == full.rpartition(".")[2]]
        near = nearest(full, same or self.keys)
        if "." not in full and not same:
            near = max(self.keys, key=lambda name: likeness(full, name.rpartition(".")[2]))
        return f"unknown key '{full}' {source}: did you mean '{near}'?"

    def _line(self, error: dict) -> str:
        """One line for an error of pydantic."""
        refused = error["type"] == "refused"
        full = ".".join([*map(str, error["loc"]), *([error["ctx"]["key"]] if refused else [])])
        owner = self._owner(full)
        value, kind = self._known(owner), self.keys[owner].type
        if full != owner and values_of(kind):
            inside = full.removeprefix(f"{owner}.").partition(".")[0]
            owner, value, kind = f"{owner}.{inside}", value[inside], values_of(kind)
        expected = error["ctx"]["expected"] if refused else in_words(kind)
        return f"{owner} = {shown(value)} {self._source(owner) or 'by default'}: expected {expected}"


def flatten(mapping: Mapping, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; an empty mapping is a value."""
    flat = {}
    for name, value in mapping.items():
        whole = not isinstance(value, Mapping) or not value
        flat |= {f"{prefix}{name}": value} if whole else flatten(value, f"{prefix}{name}.")
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
    """The nested mapping of values by dotted key."""
    result: dict = {}
    for full, value in flat.items():
        *parents, name = full.split(".")
        inner = result
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return result


def read_yaml(path: Path) -> dict:
    """The content of a config file, nested. Raises UserError."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {_one_line(error)}") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"config file {path} holds no mapping of keys to values")
    return content or {}


def parse_yaml(text: str, loader: type = yaml.BaseLoader) -> Any:
    """The content of a YAML text. Whatever it holds runs no code, and asks for no more memory than its values need.

    Raises yaml.YAMLError, also for a key that stands twice, for tags of other types than YAML's own, and for aliases
    that hold themselves, or grow.
    """
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"{len(text)} characters, more than {LARGEST}")
    try:
        reader = loader(text)
        node = reader.get_single_node()
        if node is None:
            return None
        values, levels = _extent(node, {})
        if values > MOST or levels > DEEPEST:
            raise yaml.YAMLError(f"{values} values in {levels} levels, more than {MOST} in {DEEPEST}")
        return reader.construct_document(node)
    except (RecursionError, ValueError) as error:   # too deep; a date or a number that is none
        raise yaml.YAMLError(str(error)) from None


def _extent(node: yaml.Node, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """How many values there are with every alias written out, and in how many levels. Raises yaml.YAMLError."""
    if id(node) not in known:
        known[id(node)] = math.inf, math.inf   # within itself
        if node.tag not in TAGS:
            raise yaml.YAMLError(f"the tag {node.tag} is not read")
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        names = [name.value for name, _ in pairs if isinstance(name, yaml.ScalarNode)]
        if len({*names}) < len(names):
            raise yaml.YAMLError(f"{Counter(names).most_common(1)[0][0]!r} stands there twice")
        inner = [one for pair in pairs for one in pair] or (node.value if isinstance(node, yaml.SequenceNode) else [])
        extents = [_extent(one, known) for one in inner]
        known[id(node)] = 1 + sum(count for count, _ in extents), 1 + max((level for _, level in extents), default=0)
    return known[id(node)]


def read_overrides(items: Sequence[str], texts: Collection[str]) -> dict[str, Any]:
    """['a.b=1', ...] -> settings, the last of a key counts. texts: keys whose values are texts, never lists."""
    result: dict[str, Any] = {}
    for item in items:
        full, equals, text = item.partition("=")
        if not equals or not all(full.split(".")):
            raise UserError(f"'{item}' {COMMAND_LINE} is not key=value")
        if not text:
            raise UserError(f"{full}= {COMMAND_LINE} has no value; write {full}=null for none")
        value: Any = text
        if text[0] in "[{" and full not in texts:
            try:
                value = parse_yaml(text)
            except yaml.YAMLError as error:
                raise UserError(f"{full}={text} {COMMAND_LINE} cannot be read: {_one_line(error)}") from error
        result |= flatten({full: value})
    return result


def without_folders(config: Section) -> dict:
    """The config as plain values, nested; of a `FilePath` outside of the working folder, or a text in a free mapping
    that looks like one, the last part stays."""
    values, declared = flatten(config.model_dump(mode="json")), keys(type(config))
    for full, value in values.items():   # what is in no key of the schema is in a free mapping
        if isinstance(value, str) and (full not in declared or file_name in notes_of(declared[full].type)):
            values[full] = file_name(value)
    return unflatten(values)


def save_yaml(values: Mapping, path: str | os.PathLike) -> None:
    """Writes plain values as YAML, which `read_yaml` gives back."""
    with replacing(path) as part:
        part.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), encoding="utf-8")


def shown(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return value if isinstance(value, str) else "null" if value is None else str(value).lower()


def _upwards(full: str) -> Iterator[str]:
    """'a.b.c' -> 'a.b.c', 'a.b', 'a'."""
    parts = full.split(".")
    return (".".join(parts[:count]) for count in range(len(parts), 0, -1))


def _null(value: Any) -> Any:
    """What YAML writes for nothing as None."""
    if isinstance(value, Mapping):
        return {name: _null(one) for name, one in value.items()}
    return None if isinstance(value, str) and value.lower() in ("null", "~", "") else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
