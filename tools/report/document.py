"""A page made of blocks, written as HTML in one file, or as Markdown with its pictures in a folder beside it."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
from markupsafe import Markup

from pipeline.health.verdict import Check
from tools.report.plots import themed


class Block:
    """A part of a page; the templates tell blocks apart by `kind`."""

    @property
    def kind(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class Text(Block):
    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Figures(Block):
    """The few numbers to read first: (value, caption)."""

    figures: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Toned:
    """The text of a cell in a colour."""

    text: str
    tone: Literal["good", "bad"]


@dataclass(frozen=True)
class Grid(Block):
    """A table. `numbers` names the columns that are flush right."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str | Toned]]
    numbers: Sequence[str] = ()


@dataclass(frozen=True)
class Checks(Block):
    """A verdict, check by check."""

    on_track: bool
    sentence: str
    checks: Sequence[Check]


@dataclass(frozen=True)
class Picture(Block):
    """`content` is SVG text, or the bytes of a PNG or JPEG."""

    name: str
    caption: str
    content: str | bytes

    @property
    def extension(self) -> str:
        if isinstance(self.content, str):
            return "svg"
        return "png" if self.content.startswith(b"\x89PNG") else "jpg"

    def markup(self) -> Markup:
        """For HTML: an SVG inline in the page's colours, other images as data URLs."""
        if isinstance(self.content, str):
            return Markup(themed(self.content))
        encoded = base64.b64encode(self.content).decode()
        mime = {"png": "image/png", "jpg": "image/jpeg"}[self.extension]
        return Markup('<img alt="{}" src="data:{};base64,{}">').format(self.caption, mime, encoded)


@dataclass(frozen=True)
class Code(Block):
    text: str


@dataclass(frozen=True)
class Fold(Block):
    """Blocks that stay hidden until the reader opens their title."""

    title: str
    blocks: Sequence[Code | Grid]


@dataclass(frozen=True)
class Chapter:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """A page: a title, the lead, and chapters."""

    title: str
    subtitle: str
    lead: Sequence[Block]
    chapters: Sequence[Chapter]
    foot: str

    def html(self) -> str:
        """The page as one HTML file, without scripts and without anything loaded from elsewhere."""
        return _template("page.html.j2", autoescape=True).render(page=self)

    def write_markdown(self, out: Path) -> None:
        """Write the page in GitHub's Markdown, and its pictures into the folder NAME_files beside it."""
        folder = out.with_name(f"{out.stem}_files")
        out.write_text(self.markdown(folder.name))
        for picture in (block for chapter in self.chapters for block in chapter.blocks if isinstance(block, Picture)):
            folder.mkdir(exist_ok=True)
            content = picture.content.encode() if isinstance(picture.content, str) else picture.content
            (folder / f"{picture.name}.{picture.extension}").write_bytes(content)

    def markdown(self, folder: str) -> str:
        """The page in GitHub's Markdown, which links to pictures in `folder`."""
        return _template("page.md.j2", autoescape=False).render(page=self, folder=folder)


def markdown_text(text: object) -> str:
    """A text on one line in which Markdown and HTML mean nothing, whatever names a person gave."""
    line = " ".join(str(text).split())
    line = re.sub(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", line)
    line = re.sub(r"&(?=#?\w+;)", "&amp;", line).replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^(\d*)(#+(?= |$)|[-+.)](?= )|-{3,}$)", r"\1\\\2", line)  # a heading, list or rule


def fence(text: str) -> str:
    """Backquotes that fence a text in: more of them than it has in a row."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def _template(name: str, autoescape: bool) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["tone"] = lambda cell: cell.tone if isinstance(cell, Toned) else ""
    environment.filters["words"] = lambda cell: cell.text if isinstance(cell, Toned) else str(cell)
    environment.filters["plain"] = markdown_text
    environment.filters["fence"] = fence
    return environment.get_template(name)
