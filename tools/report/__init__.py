"""`fcmae report`: a run, or several compared, as one page to keep and to send."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import StageError
from pipeline.storage.folder import is_remote
from pipeline.storage.working_copy import working_copy

if TYPE_CHECKING:
    from tools.report.document import Document


def write_report(runs: Sequence[str], out: Path | None, *, markdown: bool, compare: bool) -> Path:
    """Write the page of a run, or of several with `compare`; returns the path of the page.

    runs: run directories, or URLs on an object store, whose working copies are brought up to date first.

    Raises:
        StageError: if a run is no run directory, or the page cannot be written.
    """
    from tools.report.compare import comparison_page
    from tools.report.facts import gather
    from tools.report.page import run_page

    if compare != (len(runs) > 1):
        given = "1 run was given" if len(runs) == 1 else f"{len(runs)} runs were given"
        raise StageError(f"{given}: a report is of one run; with --compare give two or more")
    directories = [working_copy(run).resolve() for run in runs]
    name = ("comparison" if compare else "report") + (".md" if markdown else ".html")
    # The page of a URL goes to the current directory, because nobody looks into the working copy.
    out = out or (Path(name) if is_remote(runs[0]) else directories[0] / name)
    facts = [gather(directory) for directory in directories]
    document = comparison_page(facts) if compare else run_page(facts[0])
    return write_document(document, out, markdown=markdown)


def write_document(document: "Document", out: Path, *, markdown: bool) -> Path:
    """Write a page as one HTML file, or as Markdown with its pictures beside it; returns its path.

    Raises:
        StageError: if it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if markdown:
            document.write_markdown(out)
        else:
            out.write_text(document.html())
    except OSError as error:
        raise StageError(f"{out} cannot be written ({error.strerror}); give another --out") from None
    return out
