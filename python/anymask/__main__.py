"""`python -m anymask`"""

import sys

from anymask.cli import main

if __name__ == "__main__":
    sys.exit(main())
