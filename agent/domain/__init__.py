"""Plain typed values: no clock, no files, no SQL."""
