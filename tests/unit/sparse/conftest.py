import pytest
import torch


@pytest.fixture
def two_threads():
    """Run torch on two threads: some errors, such as spconv's race, do not show on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
