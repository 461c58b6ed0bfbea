"""What differs between the versions of torch that are supported, 2.11 to current, found by looking for the feature.

All such differences are handled here. pyproject.toml has the oldest version.
"""

import inspect
from typing import Any

from torch.nn.parallel import DistributedDataParallel


def without_buffer_sync() -> dict[str, Any]:
    """Return the arguments with which DDP broadcasts no buffers, neither at its start nor before a forward.

    Newer versions call the first `forward_sync_buffers` and warn of the older name.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return {
        ("forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"): False,
        "init_sync": False,
    }
