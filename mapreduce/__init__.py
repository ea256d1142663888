"""All-reduce and broadcast of training tensors through untrusted miners.

Importing this package loads neither torch nor bittensor: `mapreduce.core` and `mapreduce.wire` are
pure, and only `mapreduce.chain` and `mapreduce.net.auth` know bittensor.
"""

import logging

__version__ = "2.0.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())
