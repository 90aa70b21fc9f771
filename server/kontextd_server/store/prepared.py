"""Statements that run all the time: compiled once, then run on the driver's own cursor. Knows types; knows no tables.

What SQLAlchemy does around a statement takes longer than SQLite takes to run it. What the statement says, and how its
values are turned into the driver's and back, is still SQLAlchemy's.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.dml import UpdateBase

# Any: a named tuple of the columns of the statement, each with the type of its column.
Row = Any
Values = Mapping[str, object]
Statement = sa.Select[*tuple[Any, ...]] | UpdateBase

_Processor = Callable[[Any], Any]  # Any: from a column's type to the driver's, or back


class Statements:
    """Those of one database. Values that a statement names are to be given each time, under the same names."""

    def __init__(self, dialect: sa.Dialect) -> None:
        self._dialect = dialect
        self._prepared: dict[tuple[object, ...], _Prepared] = {}

    def rows(self, connection: sa.Connection, statement: Statement, values: Values) -> list[Row]:
        """What the statement returns; nothing where it returns no columns."""
        prepared = self._find(statement, values)
        cursor = connection.connection.cursor()
        try:
            cursor.execute(prepared.sql, prepared.arguments(values))
            return prepared.rows(cursor)
        finally:
            cursor.close()

    def each(self, connection: sa.Connection, statement: Statement, many: Sequence[Values]) -> None:
        """The statement once for each of the values."""
        prepared = self._find(statement, many[0], is_many=True)
        cursor = connection.connection.cursor()
        try:
            cursor.executemany(prepared.sql, [prepared.arguments(values) for values in many])
        finally:
            cursor.close()

    def _find(self, statement: Statement, values: Values, is_many: bool = False) -> _Prepared:
        key = (statement, is_many, *values)
        found = self._prepared.get(key)
        if found is None:
            found = self._prepared[key] = _Prepared(statement, list(values), is_many, self._dialect)
        return found


class _Prepared:
    """One statement, for values of these names."""

    def __init__(self, statement: Statement, names: list[str], is_many: bool, dialect: sa.Dialect) -> None:
        compiled = statement.compile(None, dialect, column_keys=names, for_executemany=is_many)
        assert isinstance(compiled, SQLCompiler)
        self._dialect = dialect
        self.sql = compiled.string
        self._is_positional = compiled.positiontup is not None
        self._binds = [self._bind(name, compiled.binds[name]) for name in compiled.positiontup or compiled.binds]
        if {name for name, bind in compiled.binds.items() if bind.required} != set(names):
            raise ValueError(f"{names} are not the values of: {self.sql}")
        if any(bind.expanding for bind in compiled.binds.values()):
            raise ValueError(f"it has another text for each length of a list: {self.sql}")
        self._columns = () if is_many else tuple(statement.exported_columns)
        self._row: Callable[[list[Any]], Row] = _row_of(str(column.key) for column in self._columns)
        self._from_driver: list[tuple[int, _Processor]] | None = None

    def _bind(self, name: str, bind: sa.BindParameter[Any]) -> tuple[str, object, _Processor | None]:
        """Its name, the value where the statement itself has it, and what makes the driver's of a value."""
        process = bind.type.dialect_impl(self._dialect).bind_processor(self._dialect)
        return name, None if bind.required else bind.effective_value, process

    def arguments(self, values: Values) -> Any:  # Any: in the one or the other form that drivers take
        given = [
            values.get(name, own) if process is None else process(values.get(name, own))
            for name, own, process in self._binds
        ]
        return given if self._is_positional else dict(zip((name for name, *_ in self._binds), given, strict=True))

    def rows(self, cursor: Any) -> list[Row]:  # Any: two drivers' cursors, which share no type
        if not self._columns:
            return []
        if self._from_driver is None:
            self._from_driver = self._processors(cursor.description)
        rows = []
        for values in cursor.fetchall():
            made = list(values)
            for at, process in self._from_driver:
                made[at] = process(made[at])
            rows.append(self._row(made))
        return rows

    def _processors(self, description: Sequence[Sequence[Any]]) -> list[tuple[int, _Processor]]:
        """By the place of their columns. The driver's types are known only from an answer."""
        found: list[tuple[int, _Processor]] = []
        for at, (column, told) in enumerate(zip(self._columns, description, strict=True)):
            process = column.type.dialect_impl(self._dialect).result_processor(self._dialect, told[1])
            if process is not None:
                found.append((at, process))
        return found


def _row_of(names: Iterable[str]) -> Callable[[list[Any]], Row]:
    kind: Any = namedtuple("Row", names, rename=True)  # type: ignore[misc]  # the names are a statement's
    made: Callable[[list[Any]], Row] = kind._make
    return made
