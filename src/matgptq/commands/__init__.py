"""The commands, one to a file; ``matgptq.cli`` gathers them. Heavy imports happen inside the functions."""
