"""Helpers for GenAI Lab, five notebook lessons on medical-imaging AI.

Import this package before anything that imports torchvision: it repairs a torchvision that was built
for a CUDA torch and sits beside a CPU one.
"""

from genailab_helpers._torchvision import repair_on_import

repair_on_import()
