import sys

from hmoe.training.command import main


if __name__ == "__main__":
    sys.exit(main())
