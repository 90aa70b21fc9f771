"""What can go wrong with the store. Knows no SQL: callers catch these and never SQLAlchemy's.

    StoreError
    ├── StoreUnavailable      the database does not answer, is locked or full: try again later
    ├── SchemaMismatch        the database was made by another version of kontextd
    ├── KeyRefused            an existing key that cannot be taken over
    └── UnsupportedDatabase   no kind of database that the store can use, or one with another encoding

A transition that finds the job in another state is no error: it is the method's answer.
"""

from __future__ import annotations


class StoreError(Exception):
    """Base of all errors of the store."""


class StoreUnavailable(StoreError):
    """The database did not carry the call out, or the answer was lost: the change may or may not have been made."""


class SchemaMismatch(StoreError):
    """The tables are not those that this version knows; the message says what to do."""


class KeyRefused(StoreError):
    """A key that nobody could send, that is too short to be safe, or that is known; the message does not show it."""


class UnsupportedDatabase(StoreError):
    """The URL names no database that the store can use; the message says which it can."""
