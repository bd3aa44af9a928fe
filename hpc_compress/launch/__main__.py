"""What a job runs on a node where its launcher has nothing better: `python -m hpc_compress.launch FILE`, one pickled callable.

The file lies in the run folder, to which nobody but the user may write (see `guard`); the driver has put it there.
"""

import pickle
import sys
from pathlib import Path

if __name__ == "__main__":
    pickle.loads(Path(sys.argv[1]).read_bytes())()
