"""`python -m palettax`: the command line."""

from palettax.cli import main

main()
