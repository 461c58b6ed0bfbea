"""A page as blocks, and the two ways to write it: HTML in one file, Markdown with its pictures beside it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
from markupsafe import Markup

from pipeline.health.verdict import Check
from tools.report.plots import themed

Tone = Literal["good", "bad", "quiet"]


@dataclass(frozen=True)
class Cell:
    """A cell with a colour."""

    text: str
    tone: Tone


@dataclass(frozen=True)
class Text:
    text: str
    quiet: bool = False
    kind: str = "text"


@dataclass(frozen=True)
class Figures:
    """The few numbers to read first: (value, what it is)."""

    figures: Sequence[tuple[str, str]]
    kind: str = "figures"


@dataclass(frozen=True)
class Table:
    """`numbers`: the headers of the columns that are set flush right."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    numbers: Sequence[str] = ()
    kind: str = "table"


@dataclass(frozen=True)
class Checks:
    """A verdict, check by check."""

    title: str
    on_track: bool
    sentence: str
    checks: Sequence[Check]
    kind: str = "checks"


@dataclass(frozen=True)
class Picture:
    """`content`: SVG text, or the bytes of a PNG or JPEG."""

    name: str
    caption: str
    content: str | bytes
    kind: str = "picture"

    @property
    def extension(self) -> str:
        if isinstance(self.content, str):
            return "svg"
        return "png" if self.content.startswith(b"\x89PNG") else "jpg"

    def markup(self) -> Markup:
        """For HTML: the SVG itself in the page's colours, or an image with its bytes."""
        if isinstance(self.content, str):
            return Markup(themed(self.content))
        encoded = base64.b64encode(self.content).decode()
        mime = {"png": "image/png", "jpg": "image/jpeg"}[self.extension]
        return Markup('<img alt="{}" src="data:{};base64,{}">').format(self.caption, mime, encoded)


@dataclass(frozen=True)
class Code:
    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Fold:
    """Shown when asked for."""

    title: str
    blocks: Sequence[Any]
    kind: str = "fold"


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    lead: Sequence[Any]
    sections: Sequence[Section]
    foot: str = ""

    def html(self) -> str:
        """One file, no scripts, nothing fetched from elsewhere."""
        return _template("page.html.j2", autoescape=True).render(page=self)

    def markdown(self, pictures: Path) -> str:
        """GitHub's Markdown; pictures are files in the folder `pictures`, which is beside the page."""
        return _template("page.md.j2", autoescape=False).render(page=self, folder=pictures.name)

    def pictures(self) -> list[Picture]:
        """Every picture, however deep."""

        def within(blocks: Sequence[Any]) -> list[Picture]:
            own = [block for block in blocks if isinstance(block, Picture)]
            return own + [p for block in blocks if isinstance(block, Fold) for p in within(block.blocks)]

        return [p for section in self.sections for p in within(section.blocks)] + within(self.lead)


def _template(name: str, autoescape: bool) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["tone"] = lambda cell: cell.tone if isinstance(cell, Cell) else ""
    environment.filters["words"] = lambda cell: cell.text if isinstance(cell, Cell) else str(cell)
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    return environment.get_template(name)
