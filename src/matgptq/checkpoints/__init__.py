"""The stored form: its format, opened and checked, written, changed only as a whole."""
