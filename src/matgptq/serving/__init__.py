"""Serving a checkpoint at all its widths over HTTP."""
