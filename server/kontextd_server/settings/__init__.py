"""What an operator sets by environment variable: one frozen record, read once and passed in. Imports nothing heavy.

Each field of `Settings` is one `KONTEXTD_*` variable, parsed and documented by its row; a command-line option of the
same name goes before the variable. engine.py, http.py, fetching.py and work.py hold the fields and turn them into the
records that the layers take; rows.py parses.
"""

from kontextd_server.settings.reading import SettingError, Settings, describe, names_of, read_settings, variable

__all__ = ["SettingError", "Settings", "describe", "names_of", "read_settings", "variable"]
