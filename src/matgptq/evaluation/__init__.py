"""How good and how fast each width is."""
