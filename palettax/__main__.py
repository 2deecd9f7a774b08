"""`python -m palettax`: the command line."""

from palettax.cli import main

if __name__ == "__main__":
    main()
