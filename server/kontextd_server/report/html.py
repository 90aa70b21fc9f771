"""A page, its sections and its tables. Knows HTML; knows no figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_STYLE = Path(__file__).with_name("report.css")


@dataclass(frozen=True)
class Column:
    """`kind` is a class of the style sheet: number, code, or none for plain text."""

    title: str
    kind: str = ""


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """A whole document. `lead` is text, the sections are HTML."""
    style = _STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n'
        f"{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """The parts are HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{''.join(parts)}</section>\n"


def paragraph(text: str, kind: str = "") -> str:
    """`kind` is a class of the style sheet: note, warning."""
    return f"<p{_class(kind)}>{escape(text)}</p>\n"


def heading(text: str, more: str) -> str:
    """Of a part of a section."""
    return f"<h3>{escape(text)} <span>{escape(more)}</span></h3>\n"


def facts(rows: Mapping[str, str]) -> str:
    """Names and values, under each other."""
    return (
        "<dl>\n"
        + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>\n" for key, value in rows.items())
        + ("</dl>\n")
    )


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], strong: Sequence[int] = ()) -> str:
    """Cells are text. The rows of the numbers `strong` stand out."""
    head = "".join(f"<th{_class(column.kind)}>{escape(column.title)}</th>" for column in columns)
    lines = []
    for number, row in enumerate(rows):
        cells = "".join(
            f"<td{_class(column.kind)}>{escape(cell)}</td>" for column, cell in zip(columns, row, strict=True)
        )
        lines.append(f"<tr{_class('strong' if number in strong else '')}>{cells}</tr>\n")
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n</table>\n"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
