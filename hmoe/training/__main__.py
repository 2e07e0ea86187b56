import sys

from hmoe.training.run import main


if __name__ == "__main__":
    sys.exit(main())
