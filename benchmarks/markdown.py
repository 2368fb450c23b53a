"""Tables as the README and docs/ hold them."""

from collections.abc import Iterable

__all__ = ["markdown_table"]


def markdown_table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table that ends with a line break."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    lines.insert(1, "|---" * len(columns) + "|")
    return "\n".join(lines) + "\n"
