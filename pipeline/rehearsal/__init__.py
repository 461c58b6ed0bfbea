"""Rehearse a stage in one process before its job is queued: any of its ranks, without a GPU and without other ranks."""
