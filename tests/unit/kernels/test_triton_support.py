"""Triton is chosen only where its kernels can be compiled."""

import re
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.kernels import triton_support
from pipeline.kernels.large_kernel import DepthwiseConv2d, available_forms
from pipeline.kernels.triton_support import meta_stands_for_gpu, missing_compiler, plain_kernels, runs_triton
from pipeline.models.response_norm import GRN
from pipeline.sparse import DENSE, VisibleCells
from pipeline.sparse.depthwise import convolve_tokens, fastest_variant, plan_depthwise
from tests.unit.models.tiny_models import visible_cells
from tools.bench import kernel_code

GPU = torch.device("cuda", 0)


def test_triton_is_not_chosen_where_nothing_compiles_its_kernels(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    triton_support._finds_compiler.cache_clear()
    assert "no C compiler" in missing_compiler(GPU)
    assert not runs_triton(GPU)
    assert fastest_variant(GPU, 7) == "scatter"
    assert "triton" not in available_forms(GPU)
    (tmp_path / "gcc").touch(mode=0o755)
    triton_support._finds_compiler.cache_clear()
    assert missing_compiler(GPU) == f"{tmp_path}/Python.h is missing (Debian: python3-dev)"
    assert not runs_triton(GPU)
    (tmp_path / "Python.h").touch()
    assert not runs_triton(GPU), "asked for once"
    triton_support._finds_compiler.cache_clear()
    assert runs_triton(GPU)
    assert not runs_triton(torch.device("cpu"))
    assert fastest_variant(GPU, 7) == "triton"
    assert "triton" in available_forms(GPU)
    triton_support._finds_compiler.cache_clear()


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch):
    """Triton launches on the current GPU, which `fcmae.load(..., device="cuda:1")` does not change."""
    runtime = pytest.importorskip("triton.runtime")
    from pipeline.kernels.triton_large_kernel import triton_forward, triton_weight_gradient

    current, launched = [], set()

    class Guard:
        def __init__(self, tensor: torch.Tensor):
            self.device = tensor.device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *error: object) -> None:
            current.pop()

    def launch(kernel: object, *arguments: object, **options: object) -> None:
        assert current[-1:] == [torch.device("meta")], kernel.fn.__name__
        launched.add(kernel.fn.__name__)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(runtime.JITFunction, "run", launch)
    kernel_code.packed_depthwise(8)
    kernel_code.dense_depthwise()
    kernel_code.gelu_grn(80, 64)
    kernel_code.layer_norm(80, 64)
    kernel_code.region_align()
    kernel_code.suppression(100)
    maps = kernel_code.features(2, 3, 14, 14)
    triton_forward(maps, kernel_code.features(3, 1, 11, 3))
    triton_weight_gradient(maps, maps, (11, 3))
    sources = Path(triton_support.__file__).parent.glob("triton_*.py")
    assert launched == {name for path in sources for name in re.findall(r"def (\w+_kernel)\(", path.read_text())}


def test_meta_tensors_stand_for_a_gpu():
    meta = torch.device("meta")
    assert not runs_triton(meta)
    with meta_stands_for_gpu():
        assert runs_triton(meta)
        assert fastest_variant(meta, 4) == "triton"
        assert not runs_triton(torch.device("cpu"))
        with plain_kernels():
            assert not runs_triton(meta)
        assert runs_triton(meta)
    assert not runs_triton(meta)


def test_meta_tokens_go_through_the_operator_and_take_the_autocast_of_cuda():
    cells = visible_cells((3, 4), visible=5, images=2)
    cells = VisibleCells(cells.mask, cells.grid, torch.device("meta"))
    conv, x = nn.Conv2d(6, 6, 7, padding=3, groups=6, device="meta"), torch.empty(2 * 5 * 4, 6, device="meta")
    with meta_stands_for_gpu():
        assert convolve_tokens(conv, x, plan_depthwise(cells, 2)).dtype == torch.float32
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            y = convolve_tokens(conv, x.requires_grad_(), plan_depthwise(cells, 2))
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.bfloat16, "meta")
    y.sum().backward()
    assert conv.weight.grad.shape == conv.weight.shape


def test_plain_kernels_are_torch_alone_and_end_with_the_context():
    torch.manual_seed(0)
    conv = DepthwiseConv2d(3, (9, 5))
    conv.form, x = "fft", torch.randn(2, 3, 8, 6)
    grn, features = GRN(8), torch.randn(2, 4, 4, 8, requires_grad=True)
    with plain_kernels():
        assert torch.equal(conv(x), nn.Conv2d.forward(conv, x))
        assert fastest_variant(torch.device("cpu"), 8) == "scatter"
        assert "_GRN" not in grn(features, DENSE).grad_fn.name()
    assert "_GRN" in grn(features, DENSE).grad_fn.name()
    assert fastest_variant(torch.device("cpu"), 8) == "halo"
    assert not torch.equal(conv(x), nn.Conv2d.forward(conv, x))
