"""What an evaluation found, in words for people."""

from collections.abc import Iterator, Sequence

from scacam.evaluation.intervals import Row, compared
from scacam.evaluation.metrics import titles
from scacam.evaluation.tables import named

__all__ = ["percent", "told"]


def percent(value: float, low: float, high: float, form: str = ".1f") -> str:
    """A value and its interval."""
    return f"{100 * value:{form}} [{100 * low:{form}}, {100 * high:{form}}]"


def told(rows: Sequence[Row], pairs: Sequence[Row]) -> Iterator[str]:
    """The metrics of all methods, and the best one against each other, line by line.

    Args:
        rows, pairs: as in `tables.LOCALIZATION` and `tables.DIFFERENCES`, of one network.
    """
    rows, pairs = named(rows, rows), named(rows, pairs)
    cells = {(row["method"], row["metric"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    width = max(map(len, methods))
    shown = titles({row["metric"] for row in rows}, twins=False)
    yield " " * width + "".join(f"  {title:>19}" for title in shown.values())
    for method in methods:
        found = [cells[method, name] for name in shown]
        values = (percent(row["value"], row["ci_low"], row["ci_high"]) for row in found)
        yield f"{method:<{width}}" + "".join(f"  {words:>19}" for words in values)
    comparison = compared(rows, pairs)
    if comparison is None:
        return
    yield f"\n{shown[comparison.metric]} of {comparison.best} minus that of"
    for other in comparison.others:
        verdict = "within noise" if other.noise else "more than noise"
        difference = percent(other.value, other.low, other.high, "+.1f")
        yield f"{other.method:<{width}}  {difference:>19}  {verdict}"
