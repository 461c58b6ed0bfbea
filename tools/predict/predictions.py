"""What a model says of many images: as text, CSV, JSON, or a page of thumbnails."""

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from tools.predict.image_model import Prediction


@dataclass(frozen=True)
class PredictedImages:
    """The answers for images, and what could not be read."""

    subject: str
    """The model's name for people."""
    names: Sequence[str]
    answers: Sequence[Sequence[Prediction]]
    """Of each image, the likeliest class first."""
    unreadable: Sequence[tuple[str, str]]
    """Name and reason."""

    def text(self) -> str:
        """A line for each image."""
        lines = []
        for name, answer in zip(self.names, self.answers, strict=True):
            lines.append(f"{name}: {', '.join(f'{p.name} {p.confidence:.1%}' for p in answer)}")
        return "\n".join(lines)

    def csv(self) -> str:
        """A row for each image: its name, each class with its confidence, and the error of those not read."""
        most = max(map(len, self.answers), default=0)
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        pairs = [f"{word}{rank}" for rank in range(1, most + 1) for word in ("class", "confidence")]
        writer.writerow(["image", *pairs, "error"])
        for name, answer in zip(self.names, self.answers, strict=True):
            writer.writerow([name, *(value for p in answer for value in (p.name, f"{p.confidence:.6f}")), ""])
        for name, reason in self.unreadable:
            writer.writerow([name, *[""] * len(pairs), reason])
        return stream.getvalue().rstrip("\n")

    def json(self) -> str:
        """A list with an object for each image: its predictions, or its error."""
        read = [
            {"image": name, "predictions": [{"class": p.name, "confidence": p.confidence} for p in answer]}
            for name, answer in zip(self.names, self.answers, strict=True)
        ]
        failed = [{"image": name, "error": reason} for name, reason in self.unreadable]
        return json.dumps([*read, *failed], indent=2)

    def page(self, thumbnails: Sequence[str]) -> str:
        """One HTML page without scripts: images by their first class, the most confident first.

        thumbnails: data URLs, one for each name.
        """
        above = os.path.commonprefix([name.split("/")[:-1] for name in self.names])  # noqa: RUF071 (of lists of parts)
        folder = "".join(f"{part}/" for part in above)
        by_class: dict[str, list[tuple[str, str, Sequence[Prediction]]]] = defaultdict(list)
        for name, answer, thumbnail in zip(self.names, self.answers, thumbnails, strict=True):
            by_class[answer[0].name].append((name.removeprefix(folder), thumbnail, answer))
        for images in by_class.values():
            images.sort(key=lambda image: -image[2][0].confidence)
        classes = sorted(by_class.items(), key=lambda item: (-len(item[1]), item[0]))
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("predictions.html.j2").render(predicted=self, classes=classes, folder=folder)
