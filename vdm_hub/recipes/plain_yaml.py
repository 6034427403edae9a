"""YAML as recipes hold it: the scalars of YAML 1.2's core schema, and nothing that refers, merges or constructs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from vdm_hub.errors import ConfigurationError, in_one_line, shortened

MAX_BYTES = 2**17
MAX_DEPTH = 20

_TAG = "tag:yaml.org,2002:"
_SCALARS = {  # kind: the pattern, and the characters that it begins with
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


def load(source: bytes | str, where: str) -> Any:
    r"""The content of a YAML text.

    Args:
        source: A file's content, in UTF-8.
        where: For messages: where it comes from.

    Raises:
        ConfigurationError: It is not UTF-8, not YAML, too long, too deep, or holds an alias, an anchor, a tag, a merge
            key, a key that is no text, or one that is there twice.

    >>> load("seed: 010\nlearning_rate: 1e-4\nmixed_precision: no\nat: 1:30\nmany: 1_000", "here")
    {'seed': 10, 'learning_rate': 0.0001, 'mixed_precision': 'no', 'at': '1:30', 'many': '1_000'}
    """
    if len(source) > MAX_BYTES:
        raise ConfigurationError(f"what is {where} has {len(source):,} bytes, and a recipe at most {MAX_BYTES:,}.")
    try:
        text = source.decode("utf-8-sig") if isinstance(source, bytes) else source
        return yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"what is {where} is not UTF-8 ({error}): save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        problem = " ".join(filter(None, [error.context, error.problem]))
        raise ConfigurationError(f"the YAML {where} can't be read: {problem}{line}.") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the YAML {where} can't be read: {in_one_line(error)}.") from error


def scalar(text: str) -> Any:
    """The value of a plain word of YAML: nothing, a truth value, a number, or the word itself.

    >>> [scalar(word) for word in ("010", "0x1F", "1e3", "yes", "1_000", "~")]
    [10, 31, 1000.0, 'yes', '1_000', None]
    """
    kind = next((kind for kind, pattern in _PATTERNS.items() if pattern.fullmatch(text)), None)
    return text if kind is None else _VALUES[kind](text)


def dump(values: Mapping[str, Any]) -> str:
    r"""YAML that `load` gives back, and that other readers of YAML, also of its version 1.1, take in the same way.

    >>> dump({"text": "1e3", "number": 8})
    "text: '1e3'\nnumber: 8\n"
    """
    return str(yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False))


def _integer(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_PATTERNS = {kind: re.compile(pattern) for kind, (pattern, _) in _SCALARS.items()}
_VALUES: dict[str, Any] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": _integer,
    "float": _float,
}


class _Loader(yaml.SafeLoader):
    """A loader that checks each node before it is composed, so that nothing grows beyond the text."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call, unused-ignore]
        found = {
            "an alias": isinstance(event, yaml.AliasEvent),
            "an anchor": getattr(event, "anchor", None) is not None,
            "a tag": getattr(event, "tag", None) is not None,
            f"more than {MAX_DEPTH} levels": self.depth >= MAX_DEPTH,
        }
        if wrong := next((what for what, is_so in found.items() if is_so), None):
            raise yaml.composer.ComposerError(None, None, f"a recipe has no place for {wrong}", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else self.construct_object(key, deep=True)
                raise self._refused(key, f"the key {shortened(shown, 50)} is no text")
            if key.value == "<<":
                raise self._refused(key, "a recipe has no place for a merge key")
            if key.value in seen:
                raise self._refused(key, f"the key {key.value[:50]!r} is there twice")
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        try:
            return scalar(node.value)
        except ValueError as error:  # Python reads no integer of more than 4,300 digits
            raise self._refused(node, f"the number {node.value[:20]}... is too long") from error

    @staticmethod
    def _refused(node: yaml.Node, what: str) -> yaml.YAMLError:
        return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes what either version of YAML takes for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), _first)
    _Loader.add_constructor(f"{_TAG}{_kind}", _Loader.construct_number)
