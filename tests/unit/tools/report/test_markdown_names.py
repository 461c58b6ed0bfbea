"""Names that people gave mean nothing to Markdown or HTML on a page."""

import pytest
from markdown_it import MarkdownIt

from pipeline.health.verdict import Check
from tools.report.document import Chapter, Checks, Code, Document, Figures, Fold, Grid, Picture, Text

EVIL = [
    "<img src=x onerror=alert(1)>", "<script>x</script>", "a *b* _c_ **d** __e__ `f` ~~g~~", "[a](https://b.example)",
    "![a](https://b.example/x.png)", "a | b | c", "# heading", "1. item", "- item", "---", "&lt;b&gt; &amp; &#65;",
    "\\*not\\*", "$x$", "two\n\n# lines", "> quote", "</details></table>", "+ plus", "```\n<b>\n```", "==",
    "convnextv2_base", "train/loss 0.5 [32, 64]", "*", "1) item",
]  # fmt: skip


def page(name: str) -> Document:
    blocks = [
        Text(name), Figures([(name, name)]), Grid([name, "n"], [[name, name]], ["n"]),
        Checks(True, name, [Check(name, True, name)]), Picture("a picture", name, b"\x89PNG"),
        Fold(name, [Code(name)]),
    ]  # fmt: skip
    return Document(name, name, [Text(name)], [Chapter(name, blocks)], name)


def tokens(text: str) -> list:
    parsed = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    return [inner for token in parsed for inner in (token, *(token.children or ()))]


@pytest.mark.parametrize("name", EVIL)
def test_a_name_is_text(name):
    text = page(name).markdown("page_files")
    shape = [token.type for token in tokens(page("name").markdown("page_files"))]
    found = tokens(text)
    assert [token.type for token in found if token.type != "text_special"] == shape
    shown = "".join(token.content for token in found if token.type in ("text", "text_special", "code_inline"))
    assert shown.count(" ".join(name.split())) >= 10
    (code,) = [token for token in found if token.type == "fence"]
    assert code.content == name + "\n"
