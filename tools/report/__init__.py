"""`fcmae report`: a run as one page that can be sent to somebody."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import StageError
from pipeline.storage.folder import is_remote
from pipeline.storage.working_copy import working_copy


def write_report(runs: Sequence[str], out: Path | None, *, markdown: bool, compare: bool) -> Path:
    """Write the page of a run, or with `compare` of several; returns where it is.

    runs: directories, or URLs of runs on an object store, of which a copy is brought up to date.

    Raises:
        StageError: if one is no run directory, or the page cannot be written.
    """
    from tools.report.compare import comparison
    from tools.report.facts import gather
    from tools.report.page import page

    if compare != (len(runs) > 1):
        given = "1 run was given" if len(runs) == 1 else f"{len(runs)} runs were given"
        raise StageError(f"{given}: a report is of one, and --compare needs two or more")
    directories = [working_copy(run).resolve() for run in runs]
    name = ("comparison" if compare else "report") + (".md" if markdown else ".html")
    # For a URL in the current directory: its copy is nobody's place to look.
    out = out or (Path(name) if is_remote(runs[0]) else directories[0] / name)
    facts = [gather(directory) for directory in directories]
    document = comparison(facts) if compare else page(facts[0])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if markdown:
            folder = out.with_name(f"{out.stem}_files")
            text = document.markdown(folder)
            for picture in document.pictures():
                folder.mkdir(exist_ok=True)
                content = picture.content
                data = content.encode() if isinstance(content, str) else content
                (folder / f"{picture.name}.{picture.extension}").write_bytes(data)
        else:
            text = document.html()
        out.write_text(text)
    except OSError as error:
        raise StageError(f"{out} cannot be written ({error.strerror}); give another --out") from None
    return out
