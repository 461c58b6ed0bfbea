"""Site profiles: what is refused, and with which sentence."""

from pathlib import Path

import pytest
import yaml

from cluster.site import INCLUDED_SITES, Site, check_path, load_site
from pipeline.errors import LaunchError, UserError


def load(tmp_path: Path, **fields: object) -> Site:
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(fields))
    return load_site(str(path))


@pytest.mark.parametrize("name", sorted(p.stem for p in INCLUDED_SITES.glob("*.yaml")))
def test_every_included_example_is_a_site(name):
    assert load_site(name).ranks >= 1


def test_one_rank_for_each_gpu_unless_it_says_otherwise(tmp_path):
    assert load(tmp_path).ranks == 1
    assert load(tmp_path, nodes=2, gpus_per_node=8).ranks == 16
    assert load(tmp_path, nodes=2, gpus_per_node=8, tasks_per_node=1).ranks == 2


def test_a_stage_may_differ(tmp_path):
    site = load(tmp_path, nodes=4, partition="gpu", stages={"finetune": {"nodes": 2}})
    assert (site.for_stage("pretrain").nodes, site.for_stage("finetune").nodes) == (4, 2)
    assert site.for_stage("finetune").partition == "gpu"


def test_paths_may_name_the_home_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WORK", "/work/me")
    site = load(tmp_path, run_root="$WORK/runs", source=["~/env.sh", "/odd $(name)"], local_scratch="/scratch/$USER")
    assert (site.run_root, site.source) == ("/work/me/runs", ("/home/me/env.sh", "/odd $(name)"))
    assert site.local_scratch == "/scratch/$USER"  # for the job to replace, on its own machine


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"node": 2}, "unknown key node; did you mean nodes"),
        ({"nodes": 0}, "nodes is 0"),
        ({"nodes": "2"}, "nodes is '2'"),
        ({"partition": "a\n#SBATCH --wrap=x"}, "partition: holds a line break"),
        ({"partition": "a\\b"}, "partition: holds a backslash"),
        ({"environment": {"A;B": "x"}}, r"environment\.A;B"),
        ({"environment": {"A": "x\ny"}}, r"environment\.A: holds a line break"),
        ({"modules": ["cuda\nrm"]}, "modules.0: holds a line break"),
        ({"sbatch": {"wrap": "rm"}}, r"sbatch\.wrap is set by fcmae itself"),
        ({"sbatch": {"a b": "rm"}}, r"sbatch\.a b"),
        ({"sbatch": {"array": "1-3"}}, r"sbatch\.array is set by fcmae itself"),
        ({"sbatch": {"clusters": "b"}}, r"sbatch\.clusters would keep fcmae from finding .* from a machine of that"),
        ({"sbatch": {"wait": True}}, r"sbatch\.wait would keep fcmae from finding the job that it submits; remove it$"),
        ({"sbatch": {"gpus-per-task": 1}}, r"sbatch\.gpus-per-task would hide GPUs"),
        ({"gpus_per_node": 2, "tasks_per_node": 4}, "tasks_per_node 4 exceeds gpus_per_node 2"),
        ({"gpu_type": "a100"}, "gpu_type is a100, but gpus_per_node is 0; set how many"),
        ({"gpus_per_node": 2, "gpu_type": "a100:4"}, "gpu_type is 'a100:4'"),
        ({"gpus_per_node": 2, "gpu_type": "tesla v100"}, "gpu_type is 'tesla v100'"),
        ({"gpus_per_node": 2, "gpu_type": "a100,gpu"}, "gpu_type is 'a100,gpu'"),
        ({"time_limit_minutes": 2, "stop_before_end_seconds": 120}, "stop_before_end_seconds 120 leaves no time"),
        ({"stages": {"finetune": {"nodez": 1}}}, "stages.finetune: unknown key nodez; did you mean nodes"),
        ({"stages": {"finetune": {"run_root": "/x"}}}, "stages.finetune.run_root cannot differ by stage"),
        ({"container": {"kind": "docker", "image": "x"}}, r"container\.kind is 'docker'"),
        ({"run_root": "$NOT_SET_HERE/runs"}, "run_root: names an environment variable that is not set here"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_its_field(tmp_path, fields, words):
    with pytest.raises(UserError, match=words) as refused:
        load(tmp_path, **fields)
    assert "\n" not in str(refused.value)


def test_a_site_that_is_not_there_or_no_yaml(tmp_path):
    with pytest.raises(LaunchError, match=r"there is no site nowhere, .*\(.*devcluster"):
        load_site("nowhere")
    (tmp_path / "a.yaml").write_text("nodes: [")
    with pytest.raises(LaunchError, match="cannot be read as YAML"):
        load_site(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("- nodes")
    with pytest.raises(LaunchError, match="holds a list"):
        load_site(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("odd", ["%", "\\", ":", "\n"])
def test_a_run_directory_that_slurm_would_misread_is_refused(odd):
    assert check_path(Path("/runs/it's $HOME (1)")) == Path("/runs/it's $HOME (1)")
    with pytest.raises(LaunchError, match="choose another"):
        check_path(Path(f"/runs/a{odd}b"))
