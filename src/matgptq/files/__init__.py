"""Files and directories: written whole or not at all, opened without trust, checked."""
