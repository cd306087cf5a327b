"""The formats of the published MatGPTQ code, a file each, read into one description."""
