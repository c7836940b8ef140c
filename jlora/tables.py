"""Tables as aligned text for a terminal and as HTML for a notebook."""

import html
from collections.abc import Sequence

from jlora.errors import printable

Row = Sequence[str]

__all__ = ["html_table", "text_table"]


def text_table(header: Row, rows: Sequence[Row], footer: Row | None = None, *, left: int = 1) -> str:
    """Columns two spaces apart, as wide as their widest cell; the first `left` columns lean left, the others right.

    >>> print(text_table(("name", "n"), [("query", "8"), ("up", "12")], ("2 weights", "20")))
    name        n
    ─────────  ──
    query       8
    up         12
    ─────────  ──
    2 weights  20
    """
    rows = [tuple(map(printable, row)) for row in rows]  # with names out of files
    body = [header, *rows, *([] if footer is None else [footer])]
    widths = [max(len(row[column]) for row in body) for column in range(len(header))]

    def line(row: Row) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        return "  ".join(c.ljust(w) if column < left else c.rjust(w) for column, (c, w) in cells).rstrip()

    rule = "  ".join("─" * width for width in widths)
    end = [] if footer is None else [rule, line(footer)]
    return "\n".join([line(header), rule, *map(line, rows), *end])


def html_table(header: Row, rows: Sequence[Row], footer: Row | None = None) -> str:
    """The same as an HTML table, every cell escaped."""

    def line(row: Row, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(printable(cell))}</{tag}>" for cell in row) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    foot = "" if footer is None else f"<tfoot>{line(footer, 'th')}</tfoot>"
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody>{foot}</table>"
