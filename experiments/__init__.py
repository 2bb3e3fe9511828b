"""Command lines: thin, without logic."""
