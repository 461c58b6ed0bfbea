"""The machine code of Triton kernels for a GPU that need not be there: compile what a launch would compile, and count.

Triton compiles for any CUDA target on any machine, and its wheel brings NVIDIA's disassemblers.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

WARP = 32
MULTIPLY = r"\b(F|D)(FMA|MUL)\b"
POINTER_TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8",
}  # fmt: skip


class Launch(NamedTuple):
    """A launch of a kernel that was asked for, but not made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """All arguments by name; tensors are on meta."""
    options: dict[str, Any]
    """num_warps and the like."""


class Loop(NamedTuple):
    """One loop of the machine code."""

    instructions: int
    barriers: int
    spills: int
    multiplications: int


class CompiledKernel(NamedTuple):
    """The machine code of a kernel."""

    instructions: int
    registers: int
    spills: int
    atomics: int
    loops: list[Loop]
    """Those that hold no other loop."""
    constants: dict[str, Any]
    """The kernel's compile-time constants and `num_warps`."""


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Record the launches of Triton kernels instead of making them; call the kernels with meta tensors."""
    from triton.runtime import JITFunction

    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in self.arg_names}
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self, grid, arguments, options))

    original, JITFunction.run = JITFunction.run, run
    try:
        yield launches
    finally:
        JITFunction.run = original


def compile_launch(launch: Launch, capability: int) -> Any:
    """Compile the kernel of a launch for sm_80 (`capability` 80), sm_90 and so on, specialised as the launch would."""
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, constants, signature, attributes = launch.kernel.arg_names, {}, {}, {}
    declared = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    for index, name in enumerate(names):
        value = launch.arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTER_TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]  # torch aligns its memory
        elif isinstance(value, float) and name not in declared:
            signature[name] = "fp32"
        elif name in declared or value is None or value == 1:
            signature[name], constants[(index,)] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return build(source, target=GPUTarget("cuda", capability, WARP), options=launch.options)


def compile_launches(run: Callable[[], object], capability: int) -> dict[str, CompiledKernel]:
    """Call `run` with kernels recorded instead of launched, compile each and count; by the kernels' names."""
    with record_launches() as launches:
        run()
    # Triton 3.9 warns while this is unset, and later versions no longer fuse multiplications and additions by default.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    return {launch.kernel.fn.__name__: count_code(launch, capability) for launch in launches}


def count_code(launch: Launch, capability: int) -> CompiledKernel:
    """Compile the kernel of a launch and count its instructions."""
    import triton

    compiled = compile_launch(launch, capability)
    tools = Path(triton.__path__[0]) / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing, resources = (
            subprocess.run([tools / program, option, file.name], capture_output=True, text=True, check=True).stdout
            for program, option in (("nvdisasm", "-c"), ("cuobjdump", "--dump-resource-usage"))
        )
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1])
    ends = ((labels.get(jump[1], len(code)), i + 1) for i, line in enumerate(code) if (jump := _jump(line)))
    bodies = [(start, end) for start, end in ends if start < end - 1]  # a program ends with a jump to itself
    inner = [b for b in bodies if not any(b != other and b[0] <= other[0] and other[1] <= b[1] for other in bodies)]
    return CompiledKernel(
        instructions=len(code),
        registers=int(re.search(r"REG:(\d+)", resources)[1]),
        spills=_count(code, r"\b(STL|LDL)\b"),
        atomics=_count(code, r"\b(ATOM|ATOMG|ATOMS|RED)\b"),
        loops=[
            Loop(end - start, *(_count(code[start:end], kind) for kind in (r"\bBAR\b", r"\b(STL|LDL)\b", MULTIPLY)))
            for start, end in inner
        ],
        constants={**launch.arguments, "num_warps": compiled.metadata.num_warps},
    )


def _jump(line: str) -> re.Match[str] | None:
    return re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)


def _count(code: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in code)
