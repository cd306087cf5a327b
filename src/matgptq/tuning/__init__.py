"""Scales of widths and allocations, tuned on text after the solve."""
