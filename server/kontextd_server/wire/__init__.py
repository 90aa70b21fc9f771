"""fal's wire contract as pure functions and small objects. Knows HTTP and fal's names; knows no database, no engine."""
