import os
import socket

import pytest

from tests.unit.cluster.fake_slurm import FakeSlurm


@pytest.fixture
def fake_slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path_factory.mktemp("fake") / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    return fake


@pytest.fixture
def start_rank(monkeypatch):
    """Puts this process where Slurm would start a rank of `nodes`. Names resolve as `hosts` says, or not at all."""

    def put(own: str, launcher: str, hosts: dict[str, str], nodes: str = "node[3-4]", count: int = 2) -> None:
        slurm = {
            "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
            "SLURM_NTASKS": "4", "SLURM_NNODES": str(count), "SLURM_JOB_NODELIST": nodes,
            "SLURM_LAUNCH_NODE_IPADDR": launcher,
        }  # fmt: skip

        def resolve(host: str, *arguments: object, honest=socket.getaddrinfo, **options: object) -> list:
            if host.startswith("node") and host not in hosts:
                raise socket.gaierror("some networks' name servers answer to any name")
            return honest(hosts.get(host, host), *arguments, **options)

        foreign = ("SLURM_", "GLOO_", "NCCL_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        monkeypatch.setattr(os, "environ", {**clean, **slurm})
        monkeypatch.setattr(socket, "gethostname", lambda: own)
        monkeypatch.setattr(socket, "getaddrinfo", resolve)

    return put
