"""`python -m hmoe.conversion` is `hmoe convert`."""

import sys

from hmoe_cli import main


if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
