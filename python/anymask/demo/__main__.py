"""`python -m anymask.demo`"""

import sys

from anymask.demo import main

sys.exit(main())
