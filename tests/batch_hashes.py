"""Hashes of what the ranks of a run were given, of each slot: images, labels, masks, maps, objects; in files beside the
run."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def record_batches(feed: Any, recipe: Any, seed: int, world: Any, folder: Path) -> Any:
    """Make a feed record what it hands out in a file of `folder`: {world size}-{rank}.jsonl, steps numbered as in the
    journal. Masks are those that the recipe's objective draws for what was handed out."""
    # Imported late: a rank on Slurm unpickles this before it has found its pipeline.
    from pipeline.objectives import create_objective

    objective, honest = create_objective(recipe, seed), feed.slots
    folder.mkdir(exist_ok=True)
    path = folder / f"{world.size}-{world.rank}.jsonl"

    def slots(step: int) -> Iterator[Any]:
        for batch in honest(step):
            parts = [batch.images, batch.labels, *([objective.mask(batch)] if hasattr(objective, "mask") else [])]
            parts += [] if batch.label_maps is None else [batch.label_maps]
            parts, size = [part.split(recipe.batch.slot) for part in parts], recipe.batch.slot
            if batch.objects is not None:
                starts = range(0, len(batch.ids), size)
                slots_of = [batch.part(slice(start, start + size)) for start in starts]
                parts += zip(*([*part.objects.tensors(), part.view_sizes] for part in slots_of), strict=True)
            found = {}
            for slot, *content in zip(batch.slots, *parts, strict=True):
                text = b"".join(part.contiguous().numpy().tobytes() for part in content)
                found[slot] = hashlib.sha256(text).hexdigest()
            with path.open("a") as file:
                file.write(json.dumps({"step": step + 1, "slots": found}) + "\n")
            yield batch

    feed.slots = slots
    return feed


def recorded_batches(folder: Path, world_size: int) -> dict[int, dict[int, str]]:
    """{step: {slot: hash}} of all ranks that ran in a world of this size."""
    found: dict[int, dict[int, str]] = {}
    for path in folder.glob(f"{world_size}-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault(line["step"], {}).update({int(slot): text for slot, text in line["slots"].items()})
    return found
