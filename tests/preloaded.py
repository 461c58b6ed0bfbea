"""Imported by the server of `tests.processes` before it forks: what takes seconds to import.

Half that time was garbage collection, which looked again and again at a million objects that live to the end. So there
is none meanwhile, and later ones leave those objects alone, in the forked processes too.
"""

import atexit
import contextlib
import gc
import importlib

gc.disable()
for name in (
    "pytest", "hypothesis", "torch.distributed.checkpoint", "torch.distributed.tensor", "torch.distributed.fsdp",
    "torch._dynamo", "matplotlib.pyplot", "deepspeed", "pipeline.run", "tools.cli", "tests.engines",
    "tests.faulty_rank", "tests.support",
):  # fmt: skip
    with contextlib.suppress(ImportError):  # deepspeed is an extra
        importlib.import_module(name)
gc.freeze()
gc.enable()
atexit.register(gc.unfreeze)  # triton complains of what it still has at the end
