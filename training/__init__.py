"""A run of a distillation: its settings, data, checkpoints, callbacks, speed and trainer."""

import os

# Lightning reads them while it is imported, and fails at somebody else's that is not a number.
for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
    if not os.environ.get(name, "0").isdecimal():
        del os.environ[name]
