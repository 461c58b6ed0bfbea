"""The words that messages share: numbers of things, and lists that are cut short."""

import pytest

from pipeline.errors import counted, listed


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 classes"), (1, "1 class"), (2, "2 classes"), (21841, "21,841 classes")]
)
def test_a_number_of_things_has_the_right_plural(count, words):
    assert counted(count, "class", "classes") == words
    assert counted(count, "rank") == words.replace("class", "rank").replace("rankes", "ranks")


@pytest.mark.parametrize(
    ("names", "words"),
    [("", ""), ("a", "a"), ("abc", "a, b, c"), ("abcd", "a, b, c, d"), ("abcde", "a, b, c and 2 more")],
)
def test_a_list_never_hides_a_single_name(names, words):
    assert listed(names) == words
