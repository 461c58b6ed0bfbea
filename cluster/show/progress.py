"""Show a running chain from its files alone. It may start in the middle of a run, and its errors do not end the run."""

import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner

from cluster.show.status import StageFollower, StageStatus, stage_names
from cluster.show.status_table import duration, figure, metrics_text, of_total, rate, stage_table
from pipeline.storage.machine_lock import COMPILATIONS, is_locked
from pipeline.tracking.journal import Event

COMPILING_SHOWN_AFTER_SECONDS = 2.0
LONG_SECONDS = 3600.0  # of a stage on a CPU: a sentence then names what shortens it
LONG_KNOWN_AFTER_STEPS = 2  # the first step also compiles
LINE_SECONDS = 5.0  # between two progress lines where there is no terminal


class Progress:
    """A live table with one row per stage, or plain lines if there is no terminal. Call `update` about twice a second.

    Events that the journals hold before the start only count; later ones are also printed, one line each.
    """

    def __init__(self, run_directory: str | Path, console: Console | None = None) -> None:
        self.console = console or Console(stderr=False)
        self._followers = [StageFollower(Path(run_directory) / name) for name in stage_names(run_directory)]
        self._statuses: list[StageStatus] = []
        self._live: Live | None = None
        self._line_due = 0.0
        self._announced: set[str] = set()  # what was printed: ends of stages, the compilation
        self._on_cpu: set[str] = set()  # stages that this display saw begin on a CPU
        self._broken = False
        self._compiling_since: float | None = None  # when the first rank was seen to compile

    def __enter__(self) -> "Progress":
        for follower in self._followers:
            follower.poll()
        self._statuses = [follower.status() for follower in self._followers]
        for s in self._statuses:
            if s.state == "done":
                self._announced.add(s.stage)
                self._print(f"{s.stage}: done before, {_result(s)}")
        if self.console.is_terminal:
            self._live = Live(
                stage_table(self._statuses, bars=True), console=self.console, auto_refresh=False, redirect_stderr=False
            )
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.update()
        if self._live:
            self._live.stop()
            self._live = None

    def say(self, sentence: str) -> None:
        """Print a line above the table."""
        self._print(sentence)

    def update(self) -> None:
        """Show what the files say now."""
        try:
            self._update()
        except Exception as error:  # a broken display must not end the run
            if not self._broken:
                print(f"progress display: {type(error).__name__}: {error}", file=sys.stderr)
            self._broken = True

    def _update(self) -> None:
        events = [(follower.directory.name, event) for follower in self._followers for event in follower.poll()]
        self._statuses = [follower.status() for follower in self._followers]
        for stage, event in events:
            if sentence := event_sentence(event, terse=self._live is not None):
                self._print(f"{stage}: {sentence}")
            if event.get("kind") == "attempt" and event.get("step") == 0 and event.get("device") == "cpu":
                self._on_cpu.add(stage)
        for s in self._statuses:
            if s.state == "done" and s.stage not in self._announced:
                self._announced.add(s.stage)
                self._print(f"{s.stage}: done, {_result(s)}")
        sentence = self._watch_compilation()
        if self._live:
            table = stage_table(self._statuses, bars=True)
            shown = Group(table, Spinner("dots", sentence)) if sentence else table
            self._live.update(shown, refresh=True)
        elif time.monotonic() >= self._line_due and any(event.get("kind") == "step" for _, event in events):
            self._line_due = time.monotonic() + LINE_SECONDS
            for s in self._statuses:
                if s.state == "running":
                    self._print(f"{s.stage}: {_progress_line(s)}")
        self._say_what_shortens()

    def _say_what_shortens(self) -> None:
        """Say once how long a stage takes that began on a CPU, if long, and what makes it shorter."""
        for s in self._statuses:
            if s.stage in self._on_cpu and s.step >= LONG_KNOWN_AFTER_STEPS and s.eta_seconds is not None:
                self._on_cpu.remove(s.stage)
                if s.eta_seconds >= LONG_SECONDS:
                    self._print(
                        f"{s.stage}: a CPU needs {duration(s.eta_seconds)} for this stage. Faster: a GPU, a smaller"
                        " model (such as --model atto; in a recipe defaults.model.name=convnextv2_atto), fewer epochs"
                        " (--epochs; schedule.epochs)"
                    )

    def _watch_compilation(self) -> str:
        """What the ranks compile now, as a sentence, or ""; prints it once where there is no live display."""
        lock = next(filter(is_locked, COMPILATIONS), None)
        if any(s.step for s in self._statuses) or not lock:
            self._compiling_since = None
            return ""
        if self._compiling_since is None:
            self._compiling_since = time.monotonic()
        long = time.monotonic() - self._compiling_since >= COMPILING_SHOWN_AFTER_SECONDS
        if long and not self._live and lock not in self._announced:
            self._announced.add(lock)
            self._print(COMPILATIONS[lock])
        return COMPILATIONS[lock] if long else ""

    def _print(self, line: str) -> None:
        self.console.print(escape(line), highlight=False, soft_wrap=True)


def _progress_line(s: StageStatus) -> str:
    parts = [f"step {of_total(s)}", f"loss {figure(s.loss)}" if s.loss is not None else ""]
    parts += [f"{rate(s.images_per_second)} images/s" if s.images_per_second else ""]
    parts += [f"ETA {duration(s.eta_seconds)}" if round(s.eta_seconds or 0) else ""]
    return "  ".join(part for part in parts if part)


def _result(s: StageStatus) -> str:
    weights = f"weights {s.weights_sha256[:12]}" if s.weights_sha256 else ""
    parts = [metrics_text(s.metrics), f"{s.step:,} steps", weights]
    return ", ".join(part for part in parts if part)


def event_sentence(event: Event, terse: bool) -> str:
    """An event of the journal in words; empty if it is not worth a line. `terse`: leave out what the table shows."""
    step, kind = event.get("step"), event.get("kind")
    match kind:
        case "event":
            return f"{event.get('level', 'info')}: {event.get('message', '')}"
        case "rollback":
            first, last = event.get("left_out") or (step, step)
            return f"back to step {step}: {event.get('reason', '')}; steps {first} to {last} are left out"
        case "attempt":
            start = f"resumed at step {step}" if step else "started"
            return f"{start}, attempt {event.get('attempt')}, world size {event.get('world_size', '?')}"
        case "verdict" if not event.get("on_track"):
            return str(event.get("sentence"))
        case "end" if event.get("outcome") != "done":
            at = "" if step is None else f" at step {step}"
            return f"{event.get('outcome')}{at}: {event.get('reason', '')}"
        case "evaluate" if not terse and isinstance(metrics := event.get("metrics"), dict):
            values = [f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float))]
            return f"evaluation at step {step}: {', '.join(values)}"
        case "save" if not terse:
            seconds = event.get("seconds")
            took = f" in {seconds:.1f} s" if isinstance(seconds, (int, float)) else ""
            return f"saved step {step}{took}" + (f" ({event['why']})" if event.get("why") else "")
        case "handoff" if not terse:
            return f"initial weights: {_transfer(event)}"
    return ""


def _transfer(event: Event) -> str:
    """`64 tensors loaded; initialised: head.*; dropped: head.*`. The journal has every name."""
    parts = [f"{event.get('loaded')} tensors loaded"]
    for change in ("initialised", "dropped"):
        names = event.get(change)
        if isinstance(names, list) and names:
            parts.append(f"{change}: {', '.join(sorted({_group(str(name)) for name in names}))}")
    return "; ".join(parts)


def _group(name: str) -> str:
    """The part of a model that a tensor belongs to: `head.*`, and within a backbone the part of that."""
    words = name.split(".")
    depth = 2 if words[0] == "backbone" else 1
    return name if len(words) <= depth else ".".join(words[:depth]) + ".*"
