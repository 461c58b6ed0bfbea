"""What all ways of starting a stage have in common.

One process per rank is started with RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and
calls `pipeline.run.run_stage(stage_directory)`; what becomes of the outcome is the launcher's affair. The signals that
ask for a stop may be blocked until then: `run_stage` unblocks them once its handlers stand, so that none is lost.
"""

from pipeline.errors import UserError


class LaunchError(UserError):
    """A job that cannot be submitted, asked about or cancelled."""
