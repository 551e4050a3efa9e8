"""The data modules that ship with the package, one to a file."""
