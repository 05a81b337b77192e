"""The old place of `python -m training.drawing.curves`."""

import sys

from training.drawing.curves import main

if __name__ == "__main__":
    sys.exit(main())
