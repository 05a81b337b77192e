"""Tables of figures in Markdown."""

from collections.abc import Iterable, Sequence

NONE = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Its lines: the first column to the left, the others to the right."""
    return [
        f"| {' | '.join(head)} |",
        f"|---|{'---:|' * (len(head) - 1)}",
        *(f"| {' | '.join(str(each).replace('|', '/') for each in row)} |" for row in rows),
    ]


def cell(value: float | None, scale: float, digits: int) -> str:
    """A figure, or NONE."""
    return NONE if value is None else f"{value * scale:.{digits}f}"
