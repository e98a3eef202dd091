"""s3prl's run_downstream.py with this upstream in its list: ``python PATH/s3prl_upstream -u dphubert_local ...``."""

import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

folder = Path(__file__).resolve().parent
# Python puts this folder in sys.path. It is a package, and s3prl must import nothing that lies beside it.
sys.path[0] = str(folder.parent)
upstream = import_module(folder.name)
del sys.path[0]

if __name__ == "__main__":
    import torch

    upstream.register()
    # s3prl's checkpoints hold its command line, which PyTorch 2.6 and newer otherwise refuse to read back.
    torch.serialization.add_safe_globals([Namespace])
    from s3prl.run_downstream import main

    main()
