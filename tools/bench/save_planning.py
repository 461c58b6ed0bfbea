"""CPU seconds of rank 0 for planning and committing a checkpoint of Huge, by engine, number of ranks and phase.

    python -m tools.bench.save_planning [--ranks 8 64 128 512] [--engines ddp hsdp fsdp zero3] [--torch-up-to 128]

One process plays rank 0 of so many ranks: it derives or merges the plan, decodes what the other ranks send, and encodes
`.metadata`; tensors have shapes alone. "torch" is the planner of torch.distributed.checkpoint, which this project used
before. Neither includes the copies to host memory, the files, or the network.
"""

import argparse
import dataclasses
import gc
import pickle
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from pipeline.checkpoint.dcp_writer import FileWritten
from pipeline.checkpoint.manifest import FileRecord
from pipeline.checkpoint.save_plan import Spread, StatePlan, make_write_item, pack_pairs, unpack_pairs
from pipeline.distributed.sharded_tensors import FlatShard, boxes
from pipeline.engines.fsdp import sharded_dim
from pipeline.objectives import create_objective
from tools.bench.timing import print_header, print_row
from tools.bench.workload import stage_recipe

SHARD_RANKS = {"ddp": 1, "hsdp": 8, "fsdp": 0, "zero3": 0}  # ranks that share one copy; 0 is all


def state_shapes() -> dict[str, torch.Size]:
    """The names and shapes of Huge's state in FCMAE pre-training: weights, two moments and a step counter of each."""
    recipe = stage_recipe("pretrain", "ddp", "convnextv2_huge")
    with torch.device("meta"):
        model = create_objective(recipe, seed=0).build_model()
    shapes = {f"model.{name}": p.shape for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        shapes[f"optim.{name}.step"] = torch.Size(())
        shapes |= {f"optim.{name}.{moment}": parameter.shape for moment in ("exp_avg", "exp_avg_sq")}
    return shapes | {"step": torch.Size(())}


def make_spreads(engine: str, ranks: int) -> list[Spread]:
    """How the engine spreads Huge's state."""
    parts = SHARD_RANKS[engine] or ranks
    shards = tuple(tuple(range(part, ranks, parts)) for part in range(parts))
    spreads = []
    for name, shape in state_shapes().items():
        if engine == "ddp" or not shape:
            spreads.append(Spread(name, shape, torch.float32, None, (tuple(range(ranks)),)))
        elif engine == "zero3":
            spreads.append(Spread(name, shape, torch.float32, None, ()))
        else:
            spreads.append(Spread(name, shape, torch.float32, sharded_dim(shape, parts), shards))
    return spreads


def runs_of(spreads: list[Spread], rank: int, ranks: int) -> list[tuple[int, int]]:
    """The start and length of each FlatShard of a rank under ZeRO-3."""
    sizes = [spread.shape.numel() for spread in spreads if not spread.holders]
    starts = [(min(rank * -(-size // ranks), size), size) for size in sizes]
    return [(start, min(-(-size // ranks), size - start)) for start, size in starts]


class Phases:
    """CPU seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began
        return result


def rank_zeros_tensors(spreads: list[Spread], ranks: int) -> dict[str, torch.Tensor]:
    """Rank 0's tensors without values; of FSDP's shards the shape alone matters, so they are plain tensors here."""
    runs = iter(runs_of(spreads, 0, ranks))
    tensors = {}
    for spread in spreads:
        if spread.holders:
            tensors[spread.name] = torch.empty(spread.shape, dtype=spread.dtype, device="meta")
        else:
            start, length = next(runs)
            local = torch.empty(length, dtype=spread.dtype, device="meta")
            tensors[spread.name] = FlatShard(local, start, spread.shape)
    return tensors


def derived(spreads: list[Spread], ranks: int) -> dict[str, float]:
    """The phases of this project's first save, and "later": all of them in a save after it."""
    phases, plan = Phases(), StatePlan(spreads, ranks)
    runs = [pack_pairs(runs_of(spreads, rank, ranks)) for rank in range(ranks)]
    tensors = rank_zeros_tensors(spreads, ranks)
    gc.collect()
    phases.time("own plan", lambda: (plan.digest, plan.items(0, tensors)))
    sent_plans = [pickle.dumps(SavePlan([], planner_data=(plan.digest, run))) for run in runs]
    counts, iterators = [0] * ranks, [iter(unpack_pairs(run)) for run in runs]
    for spread, writers in zip(spreads, plan.writers, strict=True):
        for writer, _ in plan.all_boxes(spread, writers, iterators):
            counts[writer] += 1
    record = FileRecord(1, "0" * 64)
    sent_files = [
        pickle.dumps([FileWritten(f"__{rank}_0.distcp", record, pack_pairs((n, 1) for n in range(count)))])
        for rank, count in enumerate(counts)
    ]
    plans = phases.time("decode", lambda: [pickle.loads(sent) for sent in sent_plans])
    phases.time("answer", lambda: [pickle.dumps(SavePlan([])) for _ in plans])
    files = phases.time("decode", lambda: [pickle.loads(sent)[0] for sent in sent_files])
    places = [(file.name, file.places) for file in files]
    first = phases.time("metadata", lambda: plan.metadata(runs, places))
    later = Phases()
    later.time("later", lambda: [pickle.loads(sent) for sent in [*sent_plans, *sent_files]])
    later.time("later", lambda: (list(spreads) == plan.spreads, (runs, places) == (list(runs), list(places))))
    return {**phases.seconds, "later": later.seconds["later"], "metadata MB": len(first) / 1e6}


def merged(spreads: list[Spread], ranks: int) -> dict[str, float]:
    """The phases of torch's planner, which are the same at each save."""
    phases = Phases()

    def local_plan(rank: int) -> SavePlan:
        items: list[WriteItem] = []
        runs = iter(runs_of(spreads, rank, ranks))
        for spread in spreads:
            if spread.holders:
                own = [spread.part(next(part for part, held in enumerate(spread.holders) if rank in held))]
            else:
                start, length = next(runs)
                own = list(boxes(spread.shape, start, start + length))
            kind = WriteItemType.TENSOR if spread.dim is None and spread.holders else WriteItemType.SHARD
            tensor = torch.empty((), dtype=spread.dtype)
            items += [dataclasses.replace(make_write_item(spread, tensor, box), type=kind) for box in own]
        names = {spread.name: (spread.name,) for spread in spreads}
        return SavePlan(items, planner_data=names)

    sent_plans = [pickle.dumps(local_plan(rank)) for rank in range(ranks)]
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, is_coordinator=True)
    plans = phases.time("decode", lambda: [pickle.loads(sent) for sent in sent_plans])
    final, metadata = phases.time("own plan", lambda: planner.create_global_plan(plans))
    answers = phases.time("answer", lambda: [pickle.dumps(plan) for plan in final])
    del answers
    sent_results = [
        pickle.dumps([WriteResult(i.index, 1, _StorageInfo(f"__{rank}_0.distcp", 1, 1)) for i in plan.items])
        for rank, plan in enumerate(final)
    ]
    results = phases.time("decode", lambda: [pickle.loads(sent) for sent in sent_results])

    def finish() -> bytes:
        metadata.storage_data = {}
        for written in results:
            metadata.storage_data.update({result.index: result.storage_data for result in written})
        return pickle.dumps(metadata)

    content = phases.time("metadata", finish)
    phases.time("answer", lambda: pickle.dumps(metadata))  # sent to all ranks
    return {**phases.seconds, "later": sum(phases.seconds.values()), "metadata MB": len(content) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 128, 512])
    parser.add_argument("--engines", nargs="+", choices=list(SHARD_RANKS), default=list(SHARD_RANKS))
    parser.add_argument("--torch-up-to", type=int, default=128, help="most ranks of torch's planner, which takes long")
    options = parser.parse_args()
    names = ["own plan", "decode", "answer", "metadata"]
    print_header(["engine", "ranks", "planner", *names, "first save", "later save", "`.metadata` MB"])
    for engine in options.engines:
        for ranks in options.ranks:
            spreads = make_spreads(engine, ranks)
            works = {"torch": merged} if ranks <= options.torch_up_to else {}
            for planner, work in {**works, "derived": derived}.items():
                gc.collect()
                seconds = work(spreads, ranks)
                cells = [f"{seconds[name]:.2f}" for name in names]
                total = sum(seconds[name] for name in names)
                sizes = [f"{total:.2f}", f"{seconds['later']:.2f}", f"{seconds['metadata MB']:.1f}"]
                print_row([engine, ranks, planner, *cells, *sizes])


if __name__ == "__main__":
    main()
