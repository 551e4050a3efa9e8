"""The callbacks that ship with the package, one to a file."""
