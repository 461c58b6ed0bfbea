"""Sixty malformed inputs of twelve kinds, drawn with a fixed seed; `tests.chaos.malformed` gives 500 and more."""

from collections import Counter

from tests.chaos.malformed import KINDS, Workshop, give_all, run_here


def test_malformed_inputs_end_in_sentences(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "real").mkdir()
    shop = Workshop.set_up(tmp_path / "real", trained=False)
    endings = give_all(shop, tmp_path, cases=60, chosen_seed=0, run=run_here)
    assert {ending.kind for ending in endings} == set(KINDS)
    assert len(endings) >= 55
    assert not [ending for ending in endings if ending.bad]
    assert Counter(ending.how for ending in endings)["refused"] > 20
