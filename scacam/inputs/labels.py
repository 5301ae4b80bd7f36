"""Labels as people write them: numbers, or names that a network's class names make numbers."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files

import pyarrow as pa
import pyarrow.compute as pc

from scacam.errors import RunError

__all__ = [
    "class_ids",
    "imagenet_names",
    "imagenet_wnids",
    "parse_labels",
    "plain",
    "refuse_rows",
]

_NUMBER = r"^[+-]?\d+([.,]0*)?$"
_LARGEST = 2**31 - 1
_MOST = 0.8


def parse_labels(column: pa.ChunkedArray, where: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Class numbers (int32) and class names (string), null where the other has the value.

    Both are null where there is no label: a null, NaN, an empty string, -1.

    Args:
        column: numbers that are whole, truth values, or text that holds numbers or names.
        where: what it is of, for error messages.

    Raises:
        RunError: they are something else, or numbers that no class can have.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = kind.value_type
    names = pa.chunked_array([pa.nulls(len(column), pa.string())])
    try:
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            column, kind = column.cast(pa.string()), pa.string()
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            text = pc.utf8_trim_whitespace(column.cast(pa.string()))
            is_number = pc.match_substring_regex(text, _NUMBER)
            is_name = pc.and_(pc.invert(is_number), pc.not_equal(text, ""))
            names = pc.if_else(is_name, text, None)
            text = pc.replace_substring_regex(text, r"^\+|[.,]0*$", "")
            column = pc.if_else(is_number, text, None)
        elif pa.types.is_floating(kind):
            column = pc.if_else(pc.is_nan(column), None, column)
        numbers = column.cast(pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise RunError(
            f"{where}: labels are class numbers or names, not {kind} ({error})"
        ) from error
    outside = pc.or_(pc.less(numbers, -1), pc.greater(numbers, _LARGEST))
    refuse_rows(pa.table({"label": numbers}), outside, f"{where} has labels below 0 or beyond")
    numbers = pc.if_else(pc.equal(numbers, -1), None, numbers).cast(pa.int32())
    # The bytes under a null are made the same, as in the digest of a manifest they count.
    return pc.coalesce(numbers, pa.nulls(len(numbers), pa.int32())), names


def refuse_rows(table: pa.Table, wrong: pa.ChunkedArray, message: str) -> None:
    """Raise RunError if any row of a table is wrong, with the first three of them."""
    rows = table.filter(wrong)
    if len(rows):
        first = "; ".join(str(row) for row in rows.slice(0, 3).to_pylist())
        raise RunError(f"{message}: {len(rows)} rows, the first {first}")


def plain(name: str) -> str:
    """A class name without what people write differently: case, and `_` for blanks."""
    return name.replace("_", " ").strip().casefold()


@cache
def imagenet_wnids() -> Sequence[str]:
    """The WordNet ids of ImageNet's 1000 classes, in the order of their numbers."""
    return (files("scacam.inputs") / "imagenet_wnids.txt").read_text().split()


@cache
def imagenet_names() -> Sequence[str]:
    """The names of ImageNet's 1000 classes, as torchvision has them."""
    from torchvision.models import get_weight

    return get_weight("ResNet18_Weights.IMAGENET1K_V1").meta["categories"]


def class_ids(
    names: Mapping[str, int | None], categories: Sequence[str] | None, network: str
) -> Mapping[str, int]:
    """The class that each name means among the class names of a network.

    A name is a category as it is, or apart from case and `_`, or one of its synonyms that commas
    divide; where the categories are ImageNet's, also a WordNet id. The numbers that a data set
    gives its names are taken where the network has no names, or where most of the names mean
    the classes of these numbers, and none means only others.

    Args:
        names: with the number that the data set gives each, or None.
        categories: the class names of the network.
        network: its name.

    Raises:
        RunError: the network has no class names, or names mean none of its classes, or several.
    """
    numbers = {name: number for name, number in names.items() if number is not None}
    if categories is None and len(numbers) == len(names):
        return numbers
    if categories is None:
        raise RunError(
            f"labels are names, and {network} has no class names: give them by --categories"
        )
    levels = [_index(level) for level in _levels(categories)]
    found = {name: _meant(name, levels) for name in names}
    wrong = sorted(name for name, meant in found.items() if len(meant) != 1)
    own = sum(found[name] == {number} for name, number in numbers.items())
    fitting = sum(not found[name] or number in found[name] for name, number in numbers.items())
    if wrong and fitting == len(names) and own > _MOST * len(names):
        return numbers
    if wrong:
        told = [
            f"{name} ({' or '.join(map(str, sorted(found[name]))) or 'none'})" for name in wrong
        ]
        raise RunError(
            f"{len(wrong)} of {len(found)} names of labels mean no one class of {network}: "
            + ", ".join(told[:5] + ["…"] * (len(told) > 5))
        )
    return {name: next(iter(meant)) for name, meant in found.items()}


def _meant(name: str, levels: Sequence[Mapping[str, set[int]]]) -> set[int]:
    """The classes that a name may mean; empty if none."""
    exact, *folded = levels
    if name in exact:
        return exact[name]
    candidates = [plain(name), *map(plain, name.split(","))]
    found = (level.get(candidate) for candidate in candidates for level in folded)
    return next(filter(None, found), set())


def _index(level: Iterable[tuple[int, str]]) -> Mapping[str, set[int]]:
    found = defaultdict(set)
    for class_id, name in level:
        found[name].add(class_id)
    return found


def _levels(categories: Sequence[str]) -> Iterator[Iterable[tuple[int, str]]]:
    """Classes with their names, from the names that count most to those that count least."""
    synonyms = [(i, part) for i, name in enumerate(categories) for part in name.split(",")]
    yield enumerate(categories)
    yield enumerate(map(plain, categories))
    yield [(class_id, plain(part)) for class_id, part in synonyms if part.strip()]
    if _are_imagenets(categories):
        yield enumerate(imagenet_wnids())


def _are_imagenets(categories: Sequence[str]) -> bool:
    """Whether classes are ImageNet's in its order; lists of their names differ in some."""
    if len(categories) != len(imagenet_wnids()):
        return False
    first = [plain(name.partition(",")[0]) for name in categories]
    same = sum(map(str.__eq__, first, map(plain, imagenet_names())))
    return same > _MOST * len(first)
