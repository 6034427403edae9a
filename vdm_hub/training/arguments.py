"""From a recipe and a command line to a checked `Configuration`.

One adapter around `transformers.HfArgumentParser`, which makes the command line and ``--help`` from the dataclasses of
`vdm_hub.training.configuration`. Left to itself it ignores the command line when it reads YAML, keeps ``1e-4`` as text
and takes ``max_train_steps: many``; so here argparse only collects text, and one function gives every value its type,
wherever the value comes from.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypeVar, Union

import yaml
from transformers import HfArgumentParser

from vdm_hub.data.arguments import DataArguments, Share
from vdm_hub.errors import ConfigurationError, unknown_name
from vdm_hub.fields import require
from vdm_hub.training.configuration import (
    DiffusionArguments,
    ModelArguments,
    Serialised,
    TrainingArguments,
)
from vdm_hub.training.secrets import refuse_secret, refuse_token_field

GROUPS: tuple[Any, ...] = (DataArguments, DiffusionArguments, ModelArguments, TrainingArguments)
FIELDS: dict[str, Any] = {
    f.name: typing.get_type_hints(group)[f.name] for group in GROUPS for f in fields(group) if f.init
}
"""Every field of a recipe, with its type."""

G = TypeVar("G", DataArguments, DiffusionArguments, ModelArguments, TrainingArguments)

# A field given on the command line takes the place of its alternative in the recipe.
ALTERNATIVES = (("dataset_name", "train_data_dir"), ("max_train_steps", "num_train_epochs"))

_EXPECTED: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    Serialised: "a name or a mapping",
    Share: "a share below 1 or a whole number",
}
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Configuration:
    """All that a run is told. ``parse([path])`` of a file that holds `to_yaml` gives it back.

    >>> configuration = parse(["digits", "--max_train_steps", "10"])
    >>> configuration.training.max_train_steps, configuration.data.dataset_name, configuration.training.output_dir
    (10, 'digits', 'runs/digits')
    """

    recipe: str
    data: DataArguments
    diffusion: DiffusionArguments
    model: ModelArguments
    training: TrainingArguments

    def __post_init__(self) -> None:
        if self.model.model == "hvae":  # nothing diffuses: what would have no effect is refused
            for field in fields(self.diffusion):
                value = getattr(self.diffusion, field.name)
                require(
                    value == field.default, field.name, value, "model is hvae, which has no diffusion: leave it out"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], recipe: str = "recipe", where: str = "in the values") -> Self:
        """From flat fields; those that are left out have their defaults.

        Args:
            values: Field names and values, as in a recipe. ``"recipe"`` may be among them.
            recipe: The name of the recipe, where ``values`` does not say it.
            where: For messages: where the values come from.

        Raises:
            ConfigurationError: A field is unknown, or a value has the wrong type or range.
        """
        recipe = str(values.get("recipe", recipe))
        refuse_secret("recipe", recipe)
        checked = _typed({key: value for key, value in values.items() if key != "recipe"}, where)
        checked["output_dir"] = checked.get("output_dir") or f"runs/{recipe}"

        def group(cls: type[G]) -> G:
            return cls(**{f.name: checked[f.name] for f in fields(cls) if f.name in checked})

        return cls(
            recipe, group(DataArguments), group(DiffusionArguments), group(ModelArguments), group(TrainingArguments)
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, flat, and the name of the recipe; `from_dict` inverts it."""
        groups = (self.data, self.diffusion, self.model, self.training)
        return {"recipe": self.recipe} | {key: value for group in groups for key, value in asdict(group).items()}

    def to_yaml(self) -> str:
        """`to_dict` as a recipe, with mappings for what is JSON on the command line."""
        values = self.to_dict()
        for name, annotation in FIELDS.items():
            if Serialised in _options(annotation) and isinstance(values[name], str) and values[name].startswith("{"):
                values[name] = json.loads(values[name])
        return str(yaml.safe_dump(values, sort_keys=False))


def parse(argv: Sequence[str] | None = None) -> Configuration:
    """The configuration of ``RECIPE [--field value ...]``.

    Args:
        argv: The command line without the program's name; `sys.argv` where not given.

    Raises:
        ConfigurationError: The recipe is missing or unknown, a field is unknown, a value is not of its field's type or
            out of range. The message names the field, the value and the nearest known name.
        SystemExit: After ``--help``.
    """
    parser = _parser()
    namespace, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    given = vars(namespace)
    wants_help = given.pop("help", False)
    recipe = _positional(rest)
    if wants_help:
        parser.set_defaults(**_defaults() | (_typed(*load_recipe(recipe)[1:]) if recipe else {}))
        parser.print_help()
        raise SystemExit(0)
    if recipe is None:
        raise ConfigurationError(
            f"no recipe given: name one as the first argument ({', '.join(recipes())}), or the path of a YAML file."
        )
    name, values, where = load_recipe(recipe)
    overrides = _typed(given, "on the command line")
    for pair in ALTERNATIVES:
        for ours, other in (pair, pair[::-1]):
            if overrides.get(ours) is not None and other not in overrides:
                values.pop(other, None)
    return Configuration.from_dict(_typed(values, where) | overrides, name, where)


def recipes() -> list[str]:
    """The names of the recipes that come with the package.

    >>> "digits" in recipes()
    True
    """
    files = resources.files("vdm_hub.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(recipe: str) -> tuple[str, dict[str, Any], str]:
    """A recipe's name, its fields as they are written, and words for messages that say where they come from.

    Args:
        recipe: One of `recipes`, or the path of a YAML file with flat keys. A key ``recipe`` gives the name, which is
            the file's otherwise.

    Raises:
        ConfigurationError: There is no such recipe, or it is not a YAML mapping.
    """
    if recipe in recipes():
        text = (resources.files("vdm_hub.recipes") / f"{recipe}.yaml").read_text(encoding="utf-8")
        name, where = recipe, f"in the recipe {recipe!r}"
    elif Path(recipe).is_file():
        text, name, where = Path(recipe).read_text(encoding="utf-8"), Path(recipe).stem, f"in {recipe}"
    elif Path(recipe).suffix in (".yaml", ".yml") or len(Path(recipe).parts) > 1:
        raise ConfigurationError(f"no recipe is at {recipe}: give a YAML file, or one of {', '.join(recipes())}.")
    else:
        raise unknown_name("recipe", recipe, recipes())
    try:
        values = yaml.load(text, _RecipeLoader)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the YAML {where} can't be read: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"what is {where} is no mapping of fields to values, such as `learning_rate: 2e-4`.")
    return str(values.pop("recipe", name)), values, where


class _RecipeLoader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """YAML with the scalars of version 1.2, where ``no`` is a word and ``1e-4`` a number, without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is there twice", node.start_mark)
        return mapping


_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":")[-1] not in ("bool", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false|True|False)$"), list("tfTF"))
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


class _Parser(HfArgumentParser):  # type: ignore[misc, unused-ignore]
    """argparse that raises its complaints instead of printing a usage dump."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}: write `--field value`, or `--help` for all fields.")


def _parser() -> _Parser:
    """A parser that collects the text of the fields that are given, and nothing of those that are not."""
    parser = _Parser(
        list(GROUPS),
        usage="accelerate launch -m vdm_hub.train RECIPE [--field value ...]",
        description=f"Train a variational diffusion model. RECIPE is one of {', '.join(recipes())}, or the path of a "
        "YAML file that gives any of these fields; the command line overrides it.",
        add_help=False,
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.nargs == 0:  # HfArgumentParser's --no_field, the same as --field false
            action.help = argparse.SUPPRESS
        action.type, action.choices, action.required = None, None, False
        action.metavar = _metavar(_base(FIELDS[action.dest]))
        action.default = argparse.SUPPRESS
        # Both --train_batch_size and --train-batch-size parse; --help shows the field's name alone.
        action.option_strings = action.option_strings[:1]
    parser.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS, help="Show this and end.")
    return parser


def _defaults() -> dict[str, Any]:
    return {f.name: f.default for group in GROUPS for f in fields(group)}


def _metavar(base: Any) -> str:
    if typing.get_origin(base) is Literal:
        return "|".join(typing.get_args(base))
    known = {bool: "BOOLEAN", int: "INTEGER", float: "NUMBER", Share: "NUMBER", Serialised: "NAME|JSON"}
    return known.get(base, "TEXT")


def _positional(rest: Sequence[str]) -> str | None:
    """The recipe, out of what argparse did not know."""
    for argument in rest:
        if argument.startswith("-"):
            raise _unknown_field(argument.lstrip("-").partition("=")[0].replace("-", "_"), "on the command line")
    if len(rest) > 1:
        raise ConfigurationError(
            f"give one recipe, not {len(rest)} ({', '.join(map(repr, rest))}); a field is written `--field value`."
        )
    return rest[0] if rest else None


def _unknown_field(name: str, where: str) -> ConfigurationError:
    refuse_token_field(name)
    nearest = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return ConfigurationError(f"unknown field {name!r} {where}: {hint}`--help` explains every field.")


def _typed(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values, each with its field's type."""
    for name in values:
        if name not in FIELDS:
            raise _unknown_field(str(name), where)
    return {name: _convert(name, value, where) for name, value in values.items()}


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _base(annotation: Any) -> Any:
    return next(option for option in _options(annotation) if option is not types.NoneType)


def _expected(annotation: Any) -> str:
    base = _base(annotation)
    if typing.get_origin(base) is Literal:
        return " or ".join(typing.get_args(base))
    return _EXPECTED[base]


def _convert(name: str, value: Any, where: str) -> Any:
    """One value, as its field's type.

    >>> _convert("learning_rate", "1e-4", "in a recipe"), _convert("transitions", "none", "on the command line")
    (0.0001, None)
    """
    refuse_secret(name, value)
    annotation = FIELDS[name]
    optional = types.NoneType in _options(annotation)
    if optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    base = _base(annotation)
    if typing.get_origin(base) is Literal:
        if value not in typing.get_args(base):
            raise unknown_name(f"{name} {where}", value, typing.get_args(base))
        return value
    try:
        return _CONVERTERS[base](value)
    except (TypeError, ValueError, OverflowError):
        or_none = ", or none" if optional else ""
        raise ConfigurationError(
            f"{name} must be {_expected(annotation)}{or_none}, and is {value!r} {where}: correct it there."
        ) from None


def _boolean(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    if isinstance(value, bool):
        return value
    raise TypeError


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    try:
        return int(value) if isinstance(value, str) else _whole(value)
    except ValueError:
        return _whole(float(value))  # "1e5"


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    return float(value)


def _share(value: Any) -> Share:
    """Whole numbers as ``int``; 1.0 is neither one image nor, with nothing to train on, all."""
    number = _number(value)
    return Share(_integer(value) if number == 0 or number > 1 or str(value) == "1" else number)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _serialised(value: Any) -> Serialised:
    """A name as it is; a mapping, or JSON, as JSON in one form."""
    if isinstance(value, str) and not value.strip().startswith("{"):
        return Serialised(value)
    mapping = json.loads(value) if isinstance(value, str) else value
    if not isinstance(mapping, dict):
        raise TypeError
    return Serialised(json.dumps(mapping))


_CONVERTERS: dict[Any, Any] = {
    bool: _boolean,
    int: _integer,
    float: _number,
    str: _text,
    Serialised: _serialised,
    Share: _share,
}
