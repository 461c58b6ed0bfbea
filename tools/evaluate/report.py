"""A result in words, and beside what was published."""

import json
from dataclasses import asdict

from tools.evaluate.published import Benchmark, Verdict, judge, published, table
from tools.evaluate.run import Result


def compared(result: Result, data: Benchmark | None = None, chain: str | None = None) -> list[Verdict]:
    """Against every published result of this model at this resolution.

    data: which of ImageNet's images they are; by default the validation images if there are 50,000 of 1000 classes.
    """
    count = int(result.metrics["images"])
    if data is None and (count, result.classes) == (table().images["val"], 1000):
        data = "val"
    rows = published(result.variant, result.image_size, data, chain) if data else []
    return [judge(row, result.metrics["top1"], count) for row in rows]


def to_json(result: Result, verdicts: list[Verdict]) -> str:
    told = [
        {
            **verdict.row.model_dump(mode="json"),
            "difference": verdict.difference,
            "band": verdict.band,
            "within": verdict.within,
        }
        for verdict in verdicts
    ]
    return json.dumps({**asdict(result), "published": told}, indent=2)
