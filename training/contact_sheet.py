"""The old place of `python -m training.drawing.contact_sheet`."""

import sys

from training.drawing.contact_sheet import main

if __name__ == "__main__":
    sys.exit(main())
