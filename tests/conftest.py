"""One thread for every test and what it starts.

Sums over threads round differently, so results are the same to the bit only for the same number of
threads; and tiny models are no faster on more.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
