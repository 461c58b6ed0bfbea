"""What differs between the versions of torch that are supported, 2.11 to current, found by looking for the feature.

All such differences are handled here. pyproject.toml has the oldest version.
"""

import inspect
from typing import Any

from torch.distributed.fsdp import FSDPModule
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


def fsdp_parameters(module: FSDPModule) -> list[Any]:
    """Return FSDP's private records of the parameters that a module gathers, not those of modules inside of it.

    Newer versions have several groups of them, older ones at most one.
    """
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [parameter for group in groups if group is not None for parameter in group.fsdp_params]
