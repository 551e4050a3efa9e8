"""`python -m aetheria`: the command line, where the `aetheria` script is not on the path."""

from aetheria.cli import main

if __name__ == "__main__":
    main()
