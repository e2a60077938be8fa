"""The settings of a run in a file: YAML or JSON, each value read as what its setting takes.

YAML by itself takes 1e-4 for a text and ``no`` for False, whatever it is for. Here the type of the setting decides, as
it does for a flag: ``save_strategy: no`` is a text, ``bf16: no`` is False, and ``learning_rate: 1e-4`` a number.
"""

from __future__ import annotations

import json
import re
import textwrap
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from qstar.config import check_names

SUFFIXES = (".yaml", ".yml", ".json")
NULLS = ("", "~", "null", "Null", "NULL")
TRUE_OR_FALSE = {"true": True, "false": False}
BOOLEANS = {**TRUE_OR_FALSE, "yes": True, "no": False, "on": True, "off": False}
INTEGER = re.compile(r"[-+]?(0|[1-9]\d*(_\d+)*)", re.ASCII)
NUMBER = re.compile(r"[-+]?((\d+(_\d+)*\.?\d*|\.\d+)([eE][-+]?\d+)?|\.?inf|Infinity)", re.ASCII)
SECRETS = ("hub_token",)
UNREADABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")  # which YAML has escaped, and JSON has not


def read_settings(path: str | Path, kinds: Iterable[type]) -> dict[str, Any]:
    """The settings that a file gives, by name.

    Args:
        path: a ``.yaml``, ``.yml`` or ``.json`` file in UTF-8. A null where it is the default is left out.
        kinds: dataclasses, whose fields are the settings that it may give.

    Raises:
        FileNotFoundError: there is none.
        TypeError: a setting that does not exist.
        ValueError: what is no YAML or JSON, a setting that is given twice, or a value that its setting does not take;
            with the place.
    """
    path = Path(path)
    known = {each.name: (each, hint) for kind in kinds for each, hint in typed_fields(kind)}
    given: dict[str, Any] = {}
    root = _parsed(path)
    if root is None or _is_null(root):
        return given
    if not isinstance(root, MappingNode):
        raise ValueError(f"{path} must hold settings, each as name: value, but it holds {_shown(root)}")
    for name, node in _pairs(root, path):
        check_names(str(path), [name], known.keys())
        each, hint = known[name]
        value = _Reader(path, name, each.metadata).read(node, hint)
        if value is not None or default_of(each) is not None:
            given[name] = value
    return given


def typed_fields(kind: Any) -> list[tuple[Field[Any], Any]]:
    """The fields of a dataclass that it is made with, and what type each is."""
    hints = get_type_hints(kind)
    return [(each, hints[each.name]) for each in fields(kind) if each.init]


def default_of(each: Field[Any]) -> Any:
    """The default of a field, as a file would have it."""
    value = each.default_factory() if each.default_factory is not MISSING else each.default
    return value.value if isinstance(value, Enum) else value


def _parsed(path: Path) -> Node | None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"config is {str(path)!r}, but a file must end in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"config is {str(path)!r}, but there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error.reason} at byte {error.start}") from error
    if path.suffix == ".json":
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from error
        text = _escaped(text.replace("\t", " "))  # is YAML; a tab inside a text was escaped
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                line = event.start_mark.line + 1
                raise ValueError(f"{path}, line {line}: anchors, aliases and tags (&, * and !) are not read")
        return yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{place}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from error


def _pairs(mapping: MappingNode, path: Path) -> list[tuple[str, Node]]:
    """What a mapping holds, by name."""
    lines: dict[str, int] = {}
    found = []
    for key, node in mapping.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode):
            raise ValueError(f"{path}, line {line}: a name is {_shown(key)}, but it must be a text")
        if key.value in lines:
            raise ValueError(f"{path}, line {line}: {key.value} is given twice, first in line {lines[key.value]}")
        lines[key.value] = line
        found.append((key.value, node))
    return found


class _Reader:
    """Reads the value of one setting.

    Attributes:
        path: of the file.
        name: of the setting, with those inside it.
        metadata: of its field.
    """

    def __init__(self, path: Path, name: str, metadata: Mapping[str, Any]):
        self.path, self.name, self.metadata = path, name, metadata

    def read(self, node: Node, hint: Any) -> Any:
        """``node`` as a value of the type ``hint``."""
        kinds = _alternatives(hint)
        if self.metadata.get("const") is True and bool not in kinds:
            kinds = (*kinds, bool)  # a flag that may stand alone, beside one with a text
        if type(None) in kinds and _is_null(node):
            return None
        if isinstance(node, ScalarNode):
            return self._scalar(node, kinds)
        for kind in kinds:
            inner = (get_args(kind) or (Any,))[-1]  # what it holds
            if isinstance(node, MappingNode) and (kind is Any or _is(kind, dict)):
                return {name: self._inside(name).read(each, inner) for name, each in _pairs(node, self.path)}
            if isinstance(node, SequenceNode) and (kind is Any or _is(kind, list)):
                return [self.read(each, inner) for each in node.value]
        raise self._refusal(node, kinds)

    def _inside(self, name: str) -> _Reader:
        return _Reader(self.path, f"{self.name}.{name}", {})

    def _scalar(self, node: ScalarNode, kinds: tuple[Any, ...]) -> Any:
        text, plain = _text(node), node.style is None
        if Any in kinds:
            return self._untyped(node, text, plain)
        words = TRUE_OR_FALSE if str in kinds else BOOLEANS
        if plain and bool in kinds and text.lower() in words:
            return words[text.lower()]
        if plain and int in kinds and INTEGER.fullmatch(text):
            return int(text)
        if plain and float in kinds and NUMBER.fullmatch(text):
            return _number(text)
        literals = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
        if plain and TRUE_OR_FALSE.get(text) in literals:
            return TRUE_OR_FALSE[text]
        choices = self._choices(kinds)
        if (choices and text in choices) or (not choices and str in kinds and not (plain and text in NULLS)):
            return text
        raise self._refusal(node, kinds)

    def _untyped(self, node: ScalarNode, text: str, plain: bool) -> Any:
        """A value inside a setting whose values have no declared type."""
        if not plain:
            return text
        if text in NULLS:
            return None
        if text.lower() in TRUE_OR_FALSE:
            return TRUE_OR_FALSE[text.lower()]
        if text.lower() in BOOLEANS:
            raise ValueError(
                f"{self._place(node)}: {self.name} is {text}, but it must be true, false or a text in quotation marks"
            )
        if INTEGER.fullmatch(text):
            return int(text)
        return _number(text) if NUMBER.fullmatch(text) else text

    def _choices(self, kinds: tuple[Any, ...]) -> list[str]:
        enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
        return list(self.metadata.get("choices", ())) or [each.value for kind in enums for each in kind]

    def _place(self, node: Node) -> str:
        return f"{self.path}, line {node.start_mark.line + 1}"

    def _refusal(self, node: Node, kinds: tuple[Any, ...]) -> ValueError:
        names = {bool: "true or false", int: "an integer", float: "a number", Any: "a value"}
        wanted = [names[kind] for kind in kinds if kind in names]
        if choices := self._choices(kinds):
            wanted.append(", ".join(map(repr, choices)))
        elif str in kinds:
            wanted.append("a text")
        wanted += ["a list" for kind in kinds if _is(kind, list)]
        wanted += ["names with values" for kind in kinds if _is(kind, dict)]
        if not wanted:
            return ValueError(f"{self._place(node)}: {self.name} cannot be given by a file")
        quoted = isinstance(node, ScalarNode) and node.style is not None and str not in kinds and not choices
        return ValueError(
            f"{self._place(node)}: {self.name} is {_shown(node)}, but it must be {' or '.join(wanted)}"
            + (", without quotation marks" if quoted else "")
        )


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is(kind: Any, container: type) -> bool:
    return kind is container or get_origin(kind) is container


def _is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.style is None and node.value in NULLS


def _text(node: ScalarNode) -> str:
    """The text of a scalar; JSON escapes a character beyond 16 bits as two."""
    return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")


def _number(text: str) -> float:
    return float(text.replace(".inf", "inf"))


def _shown(node: Node) -> str:
    if isinstance(node, ScalarNode):
        return "null" if _is_null(node) else repr(_text(node))
    return "a list" if isinstance(node, SequenceNode) else "names with values"


def written(given: Mapping[str, Any], defaults: Mapping[str, Any], kinds: Iterable[type], *, full: bool) -> str:
    """Settings as YAML that :func:`read_settings` reads.

    Args:
        given: the settings to write, by name.
        defaults: those of the others, for ``full``.
        kinds: dataclasses, whose fields are the settings; they give the order, the groups and the help.
        full: write the others as well, each with its help, and commented out.
    """
    lines = []
    for kind in kinds:
        for each, _ in typed_fields(kind):
            name = each.name
            if full:
                lines += textwrap.wrap(
                    " ".join(each.metadata.get("help", "").split()),
                    width=100,
                    initial_indent="\n# ",
                    subsequent_indent="# ",
                    break_on_hyphens=False,
                )
            if name in SECRETS and name in given:
                lines.append(f"# {name} is given, but not shown")
            elif name in given:
                lines.append(f"{name}: {_yaml(given[name])}")
            elif full:
                lines.append(f"#{name}: {_yaml(defaults[name])}")
    return "".join(f"{line}\n" for line in lines)


def _yaml(value: Any) -> str:
    """A value in the part of YAML that is almost JSON."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return _escaped(json.dumps(value, ensure_ascii=False))


def _escaped(text: str) -> str:
    """JSON, where every character is one that YAML takes as it is."""
    return UNREADABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
