"""`python -m lion_hf.convert`: the same as `lion-hf convert`."""

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
