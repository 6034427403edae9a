"""One schema for whatever describes a model, a measurement or a run: the types and ranges of its fields.

The schema of a config is the signature of the class that it configures, ours or a library's: ``save_pretrained``
writes each argument, so each must be there, and be of its annotated type. A range stands in the annotation, as in
``Annotated[int, Within(1, 64)]``. A record is a `typing.TypedDict`. Types are checked by `huggingface_hub`.
"""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias, Union

import diffusers
from huggingface_hub.dataclasses import type_validator

from vdm_hub.errors import CheckpointError, ConfigurationError, shortened, unknown_name
from vdm_hub.fields import members

LARGEST_INTEGER = 2**20
"""The largest integer in a model's config: nothing that a network is made of is counted in millions."""
LONGEST_TEXT = 10_000


@dataclass(frozen=True)
class Within:
    """A range of numbers, or of the lengths of texts and lists; both ends are in it.

    >>> Within(1, 3)(2)
    >>> Within(1, 3)(4)
    Traceback (most recent call last):
    ...
    ValueError: 1 to 3
    """

    least: float
    most: float

    def __call__(self, value: Any) -> None:
        """Raise a `ValueError` for what lies outside; ``None`` lies nowhere."""
        if value is None:
            return
        measured = value if isinstance(value, int | float) else len(value)
        if not self.least <= measured <= self.most:
            raise ValueError(str(self))

    def __str__(self) -> str:
        return f"{self.least:,} to {self.most:,}"


@dataclass(frozen=True)
class Like:
    """A pattern that a text matches as a whole; words say what it is of."""

    pattern: str
    words: str

    def __call__(self, value: str | None) -> None:
        """Raise a `ValueError` for another text."""
        if value is not None and re.fullmatch(self.pattern, value, re.ASCII) is None:
            raise ValueError(self.words)


@dataclass(frozen=True)
class Record:
    """What a mapping holds: the fields of a `typing.TypedDict`, all that it requires and no others.

    An annotation says ``Annotated[dict[str, Any], Record(Schema)]``, since diffusers looks whether what it loads is an
    instance of what is annotated, which nothing is of a `typing.TypedDict`.
    """

    schema: type

    def __call__(self, value: Mapping[str, Any]) -> None:
        """Raise a `ValueError` for a mapping of another kind."""
        fields = fields_of_record(self.schema)
        unknown = [str(key) for key in value if key not in fields]
        missing = [key for key, about in fields.items() if about.required and key not in value]
        for keys, what in ((unknown, "without"), (missing, "with")):
            if keys:
                raise ValueError(f"{what} {shortened(', '.join(keys[:4]))}")
        _check_values(fields, value, lambda field, one, words: ValueError(f"{field} is {shortened(one)}: {words}"))


@dataclass(frozen=True)
class Field:
    """One field of a schema.

    Attributes:
        annotation: Its type, in which `Annotated` ranges may stand.
        required: Whether it must be there.
    """

    annotation: Any
    required: bool = True


Fields: TypeAlias = Mapping[str, Field]

Count: TypeAlias = Annotated[int, Within(1, 65_536)]
"""A number of channels, groups, classes or pixels a side: of what a network is built of."""
Depth: TypeAlias = Annotated[int, Within(0, 1_024)]
"""A number of blocks or layers, one after the other."""
Dropout: TypeAlias = Annotated[float, Within(0, 0.999)]
"""The probability of leaving a value out."""
Size: TypeAlias = Count | tuple[Count, Count]
"""The size of an image: its side, or height and width."""


def check_config(cls: type, config: Mapping[str, Any], name: str) -> None:
    """Refuse a config that ``save_pretrained`` of a class did not write.

    Args:
        cls: The class that it is of: of this package, or of diffusers. What an older diffusers wrote may lack what
            was added since.
        config: As it is in the file.
        name: What messages call it.

    Raises:
        CheckpointError: A field is missing, unknown, of another type or out of range.
    """
    fields = fields_of_class(cls)
    if _is_ours(cls):
        _check_known(fields, (key for key in config if not key.startswith("_")), name, cls)
    if _is_ours(cls) or config.get("_diffusers_version") == diffusers.__version__:
        _check_complete(fields, config, name)
    check_given_fields(cls, config, name)


def check_given_fields(cls: type, config: Mapping[str, Any], name: str) -> None:
    """Refuse a config as `check_config` does, of those fields alone that are there.

    Raises:
        CheckpointError: One is of another type or out of range.
    """
    _check_values(fields_of_class(cls), config, lambda field, value, words: _damaged(name, field, value, words))


def type_of_field(cls: type, field: str) -> tuple[type, ...]:
    """The classes of which an argument of a constructor may be; any, where it does not say."""
    annotation = fields_of_class(cls)[field].annotation
    annotation = typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation
    return tuple(member for member in members(annotation) if isinstance(member, type)) or (object,)


def check_arguments(cls: type, config: Mapping[str, Any], whose: str | None = None) -> None:
    """Refuse arguments of a constructor of ours, by the same schema.

    Args:
        cls: Its class.
        config: The arguments by name.
        whose: For messages: whose arguments they are; not said where not given.

    Raises:
        ConfigurationError: One is of another type, or out of range.
    """
    prefix = "" if whose is None else f"{whose}: "
    _check_values(
        fields_of_class(cls),
        config,
        lambda field, value, words: ConfigurationError(f"{prefix}{field} is {shortened(value)}: give {words}."),
    )


def check_record(schema: type, record: Mapping[str, Any], name: str) -> None:
    """Refuse a record that we did not write.

    Args:
        schema: A `typing.TypedDict`.
        record: As it is in the file.
        name: What messages call it.

    Raises:
        CheckpointError: A field is missing, unknown, of another type or out of range.
    """
    fields = fields_of_record(schema)
    _check_known(fields, record, name, schema)
    _check_complete(fields, record, name)
    _check_values(fields, record, lambda field, value, words: _damaged(name, field, value, words))


# ---- schemas --------------------------------------------------------------------------------------------------------


@cache
def fields_of_class(cls: type) -> Fields:
    """The arguments that a class writes into its config."""
    constructor: Callable[..., Any] = cls.__init__  # type: ignore[misc]
    try:
        annotations = typing.get_type_hints(constructor, include_extras=True)
    except NameError:  # a name that was imported for type checkers alone
        annotations = {}
    left_out = {"self", *getattr(cls, "ignore_for_config", ())}
    fields = {}
    for name, parameter in inspect.signature(constructor).parameters.items():
        if name in left_out or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        annotation, default = annotations.get(name, Any), parameter.default
        if not _is_ours(cls):
            annotation = _without_literals(annotation)
        if default is not parameter.empty and not _is(annotation, _as_json(default)):
            annotation = Union[annotation, type(default)]  # noqa: UP007 - where a library is looser than it says
        endless = isinstance(default, float) and math.isinf(default)  # as of some schedulers of diffusers
        has_ranges = any(isinstance(one, Record) for one in _annotated(annotation))  # of its own
        fields[name] = Field(annotation if endless or has_ranges else Annotated[annotation, _check_bearable])
    return fields


@cache
def fields_of_record(schema: type) -> Fields:
    """The fields of a `typing.TypedDict`."""
    fields = {}
    for name, annotation in typing.get_type_hints(schema, include_extras=True).items():
        optional = typing.get_origin(annotation) is typing.NotRequired
        required: bool = schema.__total__ and not optional  # type: ignore[attr-defined]
        fields[name] = Field(typing.get_args(annotation)[0] if optional else annotation, required)
    return fields


def _annotated(annotation: Any) -> list[Any]:
    """The metadata in the annotations of a type, or of the members of a union."""
    parts = [annotation, *typing.get_args(annotation)]
    return [one for part in parts for one in getattr(part, "__metadata__", ())]


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] != "diffusers"


def _without_literals(annotation: Any) -> Any:
    """The types of the values that diffusers names: its schedulers take each other's, which are others."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return Union.__getitem__(tuple(map(_without_literals, arguments)))
    return Union.__getitem__(tuple({type(value) for value in arguments})) if origin is Literal else annotation


def _check_bearable(value: Any) -> None:
    """Refuse what makes a small file into a large model, or what JSON could not have held."""
    if isinstance(value, str):
        Within(0, LONGEST_TEXT)(value)
    elif isinstance(value, int):
        Within(-LARGEST_INTEGER, LARGEST_INTEGER)(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a finite one")
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_bearable(item)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_known(fields: Fields, content: Iterable[str], name: str, schema: type) -> None:
    unknown = next((key for key in content if key not in fields), None)
    if unknown is not None:
        what = f"field of {schema.__name__.strip('_')}"
        raise CheckpointError(
            f"{name}: {unknown_name(what, unknown, fields)} It was changed, or is of another version."
        )


def _check_complete(fields: Fields, content: Mapping[str, Any], name: str) -> None:
    missing = [field for field, about in fields.items() if about.required and field not in content]
    if missing:
        raise CheckpointError(
            f"{name} does not say {', '.join(missing[:4])}{' and more' if len(missing) > 4 else ''}, which is always "
            f"written there: it was changed, or is of another version. Save it again, or download it again."
        )


def _check_values(fields: Fields, content: Mapping[str, Any], error: Callable[[str, Any, str], Exception]) -> None:
    for field, value in content.items():
        if field in fields:
            annotation, as_json = fields[field].annotation, _as_json(value)
            try:
                type_validator(field, as_json, _plain(annotation))
                _check_ranges(annotation, as_json)
            except TypeError as wrong:
                raise error(field, value, _words(annotation)) from wrong
            except ValueError as wrong:
                raise error(field, value, f"{_words(annotation)} ({wrong})") from wrong


def _as_json(value: Any) -> Any:
    """The value with its tuples, arrays and other sequences as lists, as a file has them."""
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_as_json(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _plain(annotation: Any) -> Any:
    """A type as JSON has it, and as `huggingface_hub` knows it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _plain(arguments[0])
    if origin in (Union, types.UnionType):
        return Union.__getitem__(tuple(map(_plain, arguments)))
    if origin is Literal or annotation in (int, str, bool, type(None)):
        return annotation
    if annotation is float:
        return float | int
    kind = origin or annotation
    if not isinstance(kind, type):
        return Any
    if kind.__name__ == "ndarray":
        return list[float | int]
    if typing.is_typeddict(kind) or issubclass(kind, Mapping):
        return types.GenericAlias(dict, (str, _plain(arguments[1]))) if arguments else dict
    if issubclass(kind, Sequence):
        items = tuple(_plain(argument) for argument in arguments if argument is not Ellipsis)
        return types.GenericAlias(list, (Union.__getitem__(items),)) if items else list
    return Any


def _check_ranges(annotation: Any, value: Any) -> None:
    """The ranges within a type that a value is of; of a union, those of one member that it is of."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        _check_ranges(arguments[0], value)
        for check in arguments[1:]:
            check(value)
    elif origin in (Union, types.UnionType):
        _check_union(annotation, value)
    elif typing.is_typeddict(annotation):
        Record(annotation)(value)
    elif isinstance(value, list) and arguments:
        fixed = origin is tuple and Ellipsis not in arguments and len(arguments) > 1
        if fixed and len(value) != len(arguments):
            raise ValueError(f"{len(arguments)} entries")
        for item in value:
            _check_ranges(arguments[0], item)
    elif isinstance(value, dict) and arguments:
        for item in value.values():
            _check_ranges(arguments[-1], item)


def _check_union(annotation: Any, value: Any) -> None:
    """Raise what a member that the value is of says against it, unless one has nothing to say.

    Of records it is the one with the fewest fields too many or too few; of others, the last.
    """
    failure: ValueError | None = None
    for member in sorted(members(annotation), key=lambda member: _strange_fields(member, value), reverse=True):
        if _is(member, value):
            try:
                return _check_ranges(member, value)
            except ValueError as wrong:
                failure = wrong
    if failure is not None:
        raise failure


def _strange_fields(schema: Any, value: Any) -> int:
    """How many fields a value has that a record has not, or lacks; none for what is no record."""
    if not (typing.is_typeddict(schema) and isinstance(value, Mapping)):
        return 0
    fields = fields_of_record(schema)
    needed = {name for name, about in fields.items() if about.required}
    return len(value.keys() - fields.keys()) + len(needed - value.keys())


def _is(annotation: Any, value: Any) -> bool:
    try:
        type_validator("it", value, _plain(annotation))
    except TypeError:
        return False
    return True


# ---- words ----------------------------------------------------------------------------------------------------------

_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def _words(annotation: Any) -> str:
    """The words for the values that a field may have.

    >>> _words(Annotated[int, Within(1, 8)] | None), _words(tuple[int, int])
    ('a whole number, or null', 'a list (a whole number)')
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0])
    if origin in (Union, types.UnionType):
        return ", or ".join(dict.fromkeys(_words(argument) for argument in arguments))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    kind = origin or annotation
    if kind in _WORDS:
        return _WORDS[kind]
    if getattr(kind, "__name__", "") == "ndarray":
        return "a list (a number)"
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "an object"
    items = dict.fromkeys(_words(argument) for argument in arguments if argument is not Ellipsis)
    return f"a list ({' or '.join(items)})" if items else "what it was saved as"


def _damaged(name: str, field: str, value: Any, words: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: {field} is {shortened(value)}, and must be {words}: it was changed. Save it again, or download it "
        f"again."
    )
