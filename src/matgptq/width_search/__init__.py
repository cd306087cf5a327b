"""The search for a width per layer: costs, the exact optimum, exchanges, and the scores that they need."""
