"""`python -m lion_hf COMMAND`: the same as `lion-hf COMMAND`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
