"""For all test files: one thread, which is quicker for tiny models, by far on a busy machine."""

import os

import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start
