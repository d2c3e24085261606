"""Starts a command once for each of ``WORLD_SIZE`` ranks, in an environment as ``srun`` leaves it; ends with the first.

For runs in which the launcher has no part: DeepSpeed's imports DeepSpeed twice before the first rank starts, and looks
for their end once a second. What is left when a rank has failed is ended by whoever started this.
"""

import os
import subprocess
import sys
import time

ranks = []
for rank in map(str, range(int(os.environ["WORLD_SIZE"]))):
    ranks.append(subprocess.Popen(sys.argv[1:], env={**os.environ, "RANK": rank, "LOCAL_RANK": rank}))
while None in (ends := [rank.poll() for rank in ranks]) and not any(ends):
    time.sleep(0.02)
sys.exit(next((end for end in ends if end), 0))
