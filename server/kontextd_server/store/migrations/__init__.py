"""How the tables came to be, step by step. `versions/` is read by Alembic, in the order of `down_revision`.

To change a table: change `tables.py`, add `versions/r0002_….py` (by hand: there is no alembic.ini), never touch a
version that was released. A test holds the result of all versions against `tables.py`, on both databases.
"""
