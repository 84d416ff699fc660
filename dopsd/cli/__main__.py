"""``python -m dopsd.cli``, where the programs of the environment are not on the path."""

from dopsd.cli import main

main()
