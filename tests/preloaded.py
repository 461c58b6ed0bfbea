"""Imported by the server of `tests.processes` before it forks: what takes seconds to import, or to do the first time.

Half that time was garbage collection, which looked again and again at a million objects that live to the end. So there
is none meanwhile, and later ones leave those objects alone, in the forked processes too.
"""

import atexit
import contextlib
import gc
import importlib
import os
import tempfile


def end_at_once(server: int = os.getpid()) -> None:
    """End the server, and no process that it forked, without taking all that down, which would take seconds."""
    if os.getpid() == server:
        os._exit(0)


atexit.register(end_at_once)
gc.disable()
for name in (
    "pytest", "hypothesis", "torch.distributed.checkpoint", "torch.distributed.tensor", "torch.distributed.fsdp",
    "torch._dynamo", "matplotlib.pyplot", "deepspeed", "pipeline.run", "tools.cli", "tests.engines",
    "tests.faulty_rank", "tests.support", "torch.profiler", "PIL.ImageDraw", "PIL.ImageFont",
):  # fmt: skip
    with contextlib.suppress(ImportError):  # deepspeed is an extra
        importlib.import_module(name)


def warm_up() -> None:
    """Load the compiled decoder, fonts and the list of packages: a third of what a stage of a dozen steps computes."""
    from pipeline.data.decode import compile_decoder
    from pipeline.errors import DataError
    from pipeline.stage.environment import describe_software
    from pipeline.tracking.journal import Journal
    from pipeline.tracking.pictures import draw_curves

    with contextlib.suppress(DataError):  # without its library those tests fail that need it
        compile_decoder()
    with tempfile.TemporaryDirectory() as folder:
        with Journal(f"{folder}/journal", 1) as journal:
            for step in (1, 2):
                journal.write("step", step=step, loss=2.0 / step, lr=0.1)
        draw_curves(f"{folder}/journal", f"{folder}/curves.png")
    describe_software()


warm_up()
gc.freeze()
gc.enable()
