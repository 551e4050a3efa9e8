"""The loggers that ship with the package, one to a file."""
