import pytest
import yaml

from cluster.logs import show


@pytest.mark.parametrize("content", [None, ""])
def test_silence_is_told_too(tmp_path, capsys, content):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": {"pretrain": {}}}))
    (tmp_path / "pretrain" / "logs").mkdir(parents=True)
    if content is not None:
        (tmp_path / "pretrain" / "logs" / "rank-0.log").write_text(content)
    show(tmp_path, None, 0, 100, follow=False)
    assert capsys.readouterr().out == "rank 0 has not printed anything yet\n"
