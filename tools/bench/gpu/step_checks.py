"""Training steps of Huge: milliseconds, utilisation, memory, the kernels that take longest, and timm's step beside."""

import gc
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.cost.gpu_peaks import peak_flops
from tools.analyze.timm_import import import_timm
from tools.bench.gpu.check_table import Bench, Row
from tools.bench.gpu.repeated import seconds_each
from tools.bench.gpu.roofline_rows import predicted_ms, predicted_peak_gib
from tools.bench.gpu.training_step import StageName, StepOfStage, bare_loop, make_step, without_host_waits

TOP_KERNELS = 8


def check_fcmae_eager(bench: Bench) -> Iterator[Row]:
    """A step without compilation."""
    step = yield from _first_steps(bench, "pretrain", 64, 224, compiled=False)
    yield from _step_rows(bench, step, "eager")
    yield from _top_kernels(bench, step)
    yield _host_waits(bench, step)
    yield from _counted_rows(bench, step, compiled=False)


def check_fcmae_compiled(bench: Bench) -> Iterator[Row]:
    """A step with compiled blocks; the first one compiles."""
    step = yield from _first_steps(bench, "pretrain", 64, 224, compiled=True)
    yield from _step_rows(bench, step, "compiled")
    yield from _top_kernels(bench, step)
    yield from _counted_rows(bench, step, compiled=True)


def check_fcmae_compiled_again(bench: Bench) -> Iterator[Row]:
    """The same, where the process before has left its compiled code."""
    step = yield from _first_steps(bench, "pretrain", 64, 224, compiled=True)
    yield from _step_rows(bench, step, "compiled")


def check_dense_steps(bench: Bench) -> Iterator[Row]:
    """Fine-tuning at both resolutions, first without compilation."""
    for compiled in (False, True):
        for images, size in ((64, 224), (8, 512))[: 1 if bench.tiny else 2]:
            if not bench.has_time:
                return
            step = yield from _first_steps(bench, "finetune", images, size, compiled)
            name = f"{step.size} px x {step.images}, {'compiled' if compiled else 'eager'}"
            yield from _step_rows(bench, step, name)
            yield from _counted_rows(bench, step, compiled, name)
            del step
            _free(bench)


def check_timm_step(bench: Bench) -> Iterator[Row]:
    """The same model of another library, in channels-last memory."""
    timm = import_timm()
    images, size = (2, 64) if bench.tiny else (64, 224)
    for count in (images, images // 2):
        _free(bench)
        try:
            milliseconds = _timm_milliseconds(bench, timm, count, size)
        except torch.OutOfMemoryError:
            continue
        yield Row(f"timm {timm.__version__}, {size} px x {count}, eager: step", milliseconds, "ms")
        yield Row(f"timm, {size} px x {count}, eager: speed", 1e3 * count / milliseconds, "images/s")
        yield Row(f"timm, {size} px x {count}, eager: peak memory", bench.peak_gib(), "GiB")
        return


def _timm_milliseconds(bench: Bench, timm: Any, count: int, size: int) -> float:
    """Milliseconds of a step. In a function, so that nothing of a step that did not fit is left for the next one."""
    with bench.device:  # where initial weights are drawn fast
        model = timm.create_model(bench.model, num_classes=1000)
    model.to(memory_format=torch.channels_last)
    batch = torch.randn(count, 3, size, size, device=bench.device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(count, dtype=torch.int64, device=bench.device)
    run = bare_loop(model, lambda: F.cross_entropy(model(batch), labels), bench)
    return 1e3 * seconds_each(run, bench, repeats=3, rounds=3)


def _first_steps(bench: Bench, stage: StageName, images: int, size: int, compiled: bool) -> Iterator[Row]:
    """Make a step and run it twice, with half the images if they do not fit; returns the step."""
    if bench.tiny:
        images, size = 2, 64
    for count in (images, images // 2, images // 4):
        _free(bench)
        began = time.perf_counter()
        try:
            step = make_step(bench, stage, count, size, compiled)
            bench.synchronise()
            built, began = time.perf_counter() - began, time.perf_counter()
            step.run()
            bench.synchronise()
            first = time.perf_counter() - began
            step.run()
        except torch.OutOfMemoryError:
            if count == images // 4:
                raise
            step = None
            continue
        yield Row(f"{size} px x {count}: building", built, "s", note=step.by)
        yield Row(f"{size} px x {count}, {'compiled' if compiled else 'eager'}: first step", first, "s")
        return step
    raise AssertionError("the last size was tried")


def _step_rows(bench: Bench, step: StepOfStage, name: str) -> Iterator[Row]:
    seconds = seconds_each(step.run, bench, repeats=3, rounds=3)
    yield Row(f"{name}: step", 1e3 * seconds, "ms")
    yield Row(f"{name}: speed", step.images / seconds, "images/s")
    if bench.on_gpu:
        yield Row(f"{name}: peak memory", bench.peak_gib(), "GiB")


def _counted_rows(bench: Bench, step: StepOfStage, compiled: bool, name: str = "") -> Iterator[Row]:
    """What needs operations or bytes to be counted, which takes time: last."""
    name = name or ("compiled" if compiled else "eager")
    seconds = seconds_each(step.run, bench, repeats=2, rounds=1)
    if ms := predicted_ms(bench, step):
        yield Row(f"{name}: step, by the roofline", 1e3 * seconds, "ms", predicted=ms)
    flops = step.flops()
    yield Row(f"{name}: counted operations", flops / 1e12, "TFLOP")
    yield Row(f"{name}: reached", flops / seconds / 1e12, "TFLOP/s")
    gpu = torch.cuda.get_device_name(bench.device) if bench.on_gpu else "none"
    if peak := peak_flops(gpu, "bf16"):
        yield Row(f"{name}: utilisation", 100 * flops / seconds / peak, "% of the peak")
    if gib := predicted_peak_gib(step):
        yield Row(f"{name}: peak memory, by `fcmae estimate`", bench.peak_gib(), "GiB", predicted=gib)


def _top_kernels(bench: Bench, step: StepOfStage) -> Iterator[Row]:
    """The kernels of a step that take longest; on a CPU the operators."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step.run()
        bench.synchronise()
    profile.export_chrome_trace(str(bench.folder / "fcmae.trace.json.gz"))
    # Marks of a program span kernels, and operators have the time of those that they start: both would count twice.
    events = [event for event in profile.key_averages() if not getattr(event, "is_user_annotation", False)]
    kernels = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
    clock = "self_device_time_total" if kernels else "self_cpu_time_total"
    times = {event.key: (getattr(event, clock), event.count) for event in kernels or events}
    for name, (microseconds, count) in sorted(times.items(), key=lambda item: -item[1][0])[:TOP_KERNELS]:
        yield Row(f"kernel {name[:70]}", microseconds / 1e3, "ms", note=f"{count} times")


def _host_waits(bench: Bench, step: StepOfStage) -> Row:
    try:
        with without_host_waits(bench):
            step.run()
    except RuntimeError as error:
        return Row("host waits within a step", 1.0, "", predicted=0.0, note=str(error).splitlines()[0])
    return Row("host waits within a step", 0.0, "", predicted=0.0)


def _free(bench: Bench) -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
