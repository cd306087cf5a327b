"""What the layers of a block see of the calibration text, and how much it matters."""
