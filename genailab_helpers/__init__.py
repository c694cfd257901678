"""Helpers for GenAI Lab, notebook lessons on medical-imaging AI.

Import this package before anything that imports torch or torchvision: it repairs a torchvision that was built
for a CUDA torch and sits beside a CPU one, and lets idle threads of torch sleep.
"""

import os

from genailab_helpers import _torchvision  # noqa: F401 (mends the first import of torchvision)

# Threads that wait by spinning take the core away from whoever they wait for: beside other work on the
# machine, lesson 2 took three times as long with two threads. Must be set before torch starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
