"""The systems there are: one table of all, or everything about one."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from avzero.errors import UserError
from avzero.models._contract import Card, Kind, ModelConfig, Shapes, trainable
from avzero.models._registry import make_config, model_class, model_files, outline
from avzero.spec import TRAIN_FIELDS, Preset, TrainConfig, validate
from avzero.tune.space import SpaceFile, load_space

SIZES = {
    "main": Shapes({"audio": 512, "video": 512}, 300),
    "cls": Shapes({"audio": 128, "video": 4096}, 300),
}
"""Feature sets whose parameter counts are listed (data_formats.md section 4)."""
_SHORT: dict[Kind, str] = {"averaged": "avg", "clipclap": "clip", "temporal": "temp"}
_WIDE, _MIDDLE = 150, 118


@dataclass(frozen=True)
class System:
    """What is known of a system without training it."""

    name: str
    card: Card
    docstring: str
    parameters: dict[str, int]
    """Trainable ones at the default hyperparameters, by feature set; where it takes such."""
    defaults: dict[str, Any]
    """Of its own hyperparameters and of the training settings its search space names."""
    compat: dict[str, Any]
    ranges: dict[str, str]
    """Searched hyperparameters, the training settings among them."""
    published: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        data = asdict(self)
        card: dict[str, Any] = data.pop("card")
        return {"name": data.pop("name")} | card | data


def describe(name: str) -> System:
    """Return what is known of a system.

    Raises:
        UserError: there is no such system, it has no search space, or something is wrong in that.
    """
    cls, space, where = model_class(name), load_space(name), f"search space of {name}"
    known = TRAIN_FIELDS | set(cls.Config.model_fields)
    for key in (*space.space, *(k for point in space.published for k in point.values)):
        if key not in known:
            raise UserError(
                f"{where}: {name} has no hyperparameter {key!r}; it has {', '.join(sorted(known))}"
            )
    own = {k: v for k, v in space.defaults.items() if k not in TRAIN_FIELDS}
    config = make_config(name, own, Preset.PAPER, where)
    given = {k: v for k, v in space.defaults.items() if k in TRAIN_FIELDS}
    train = validate(TrainConfig, given, where)
    settings = {k: getattr(train, k) for k in TRAIN_FIELDS}
    named = [k for k in (*space.space, *space.defaults) if k in TRAIN_FIELDS]
    return System(
        name=name,
        card=cls.card,
        docstring=ast.get_docstring(ast.parse(model_files()[name].read_bytes())) or "",
        parameters=dict(_counts(name, config)),
        defaults=config.model_dump(mode="json") | {k: settings[k] for k in named},
        compat=dict(cls.compat),
        ranges=_ranges(space, where),
        published=[point.model_dump(mode="json") for point in space.published],
    )


def _counts(system: str, config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Yield (feature set, trainable parameters); shapes alone, no memory is taken."""
    for name, shapes in SIZES.items():
        if "averaged" in model_class(system).card.features:
            model = outline(system, config, shapes)
            yield name, sum(p.numel() for _, p in trainable(model))


def _ranges(space: SpaceFile, where: str) -> dict[str, str]:
    """Return every searched hyperparameter's range as text.

    Raises:
        UserError: one is no range; the message starts ``where``.
    """
    shown = {}
    for key, range_ in space.space.items():
        range_.distribution(f"{where}: {key}")
        ((kind, values),) = range_.model_dump(by_alias=True, exclude_none=True).items()
        text = ", ".join(map(_value, values))
        shown[key] = text if kind == "choice" else f"{' … '.join(map(_value, values))} ({kind})"
    return shown


def _value(value: object) -> str:
    """Return a value as people write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def all_systems() -> list[System]:
    """Return every system, sorted by name."""
    return [describe(name) for name in model_files()]


def overview(systems: Sequence[System], width: int) -> Table:
    """Return the table of all systems for a terminal of a width; narrow ones get fewer columns."""
    wide, middle = width >= _WIDE, width >= _MIDDLE
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    columns = [
        ("system", True),
        ("title", wide),
        ("year", True),
        ("venue", middle),
        ("features", True),
        *((name, True) for name in SIZES),
        ("searched", True),
        ("evidence", True),
        ("fixture", middle),
        ("options", wide),
    ]
    for name, shown in columns:
        if shown:
            numbers = name in SIZES or name == "searched"
            # Only options are many words; everything else is one line and never cut.
            table.add_column(
                name,
                justify="right" if numbers else "left",
                no_wrap=name != "options",
                overflow="fold",
            )
    for system in systems:
        cells = _cells(system)
        table.add_row(*(cells[name] for name, shown in columns if shown))
    sizes = "; ".join(
        f"{name}: audio {shapes.features['audio']}, video {shapes.features['video']}"
        for name, shapes in SIZES.items()
    )
    table.caption = (
        f"\nTrainable parameters at {sizes}. Searched: hyperparameters with a range. Features: "
        f"{', '.join(f'{short} = {kind}' for kind, short in _SHORT.items())}. All of one system: "
        "avzero models NAME"
    )
    table.caption_justify = "left"
    return table


def _cells(system: System) -> dict[str, str]:
    """Return a system's row by column."""
    card = system.card
    return {
        "system": system.name,
        "title": card.title,
        "year": str(card.year),
        "venue": card.venue,
        "features": " ".join(_SHORT[kind] for kind in card.features),
        **{name: _millions(system.parameters.get(name)) for name in SIZES},
        "searched": str(len(system.ranges)),
        "evidence": card.evidence,
        "fixture": card.fixture,
        "options": ", ".join(option.split()[0] for option in card.options),
    }


def _millions(count: int | None) -> str:
    """Return a count of parameters in millions."""
    return "-" if count is None else f"{count / 1e6:.2f} M"


def in_full(system: System) -> list[RenderableType]:
    """Return everything about one system, part by part."""
    card = system.card
    how = "public code" if card.evidence == "code" else "reconstructed in part, as listed above"
    counts = ", ".join(f"{name} {count:,}" for name, count in system.parameters.items())
    parts: list[RenderableType] = [
        _reflowed(system.docstring) or f"{card.title}: {card.authors}; {card.link}",
        "",
        f"Published: {card.venue} {card.year}. Evidence: {how}. Fixture: {card.fixture}.",
        f"Features: {', '.join(card.features)}. Trainable parameters: {counts or 'not averaged'}.",
    ]
    parts += [f"Option: {option}" for option in card.options]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("hyperparameter", "default", "compat", "range"):
        table.add_column(column, no_wrap=column == "hyperparameter")
    for key, value in system.defaults.items():
        compat = _value(system.compat[key]) if key in system.compat else ""
        table.add_row(key, _value(value), compat, system.ranges.get(key, ""))
    parts.append(table)
    for point in system.published:
        values = ", ".join(f"{k} {_value(v)}" for k, v in point["values"].items())
        parts.append(f"{point['dataset']} {point['features']}: {values or 'the defaults'}")
        parts.append(f"  {point['source']}")
    return parts


def _reflowed(text: str) -> str:
    """Join the lines of each paragraph, so that any terminal can break them where it ends.

    Lists and indented lines stay as they are.
    """
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        fixed = any(line.startswith(("- ", "* ", " ", "|")) for line in lines)
        paragraphs.append(paragraph if fixed else " ".join(lines))
    return "\n\n".join(paragraphs)
