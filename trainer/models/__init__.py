"""What is trained, and in which files does it come?"""

import logging

# diffusers imports bitsandbytes, which warns as it loads that an optional 4-bit kernel is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
