"""What a build looks like: a progress line with an estimate on a terminal, plain lines off it, always on stderr."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from edgedistill.errors import EdgeDistillError
from edgedistill.plan import Step
from edgedistill.runner import Reporter

PLAIN_EVERY_S = 20.0


def clock(seconds: float | None) -> str:
    """Write seconds as m:ss (or h:mm:ss), "?" if unknown."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TerminalReporter(Reporter):
    """Tell a build's progress on stderr."""

    def __init__(self, *, quiet: bool = False, raised: bool = False) -> None:
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.quiet, self.raised = quiet, raised
        self._live: Progress | None = None
        self._task = None
        self._number = self._total = 0
        self._started = self._printed = 0.0
        self._estimate: float | None = None
        self._after: float | None = None

    def plan(self, total: int, to_run: int, seconds: float | None) -> None:
        """Say how much there is to do."""
        self._total = to_run
        if to_run and not self.quiet:
            self.console.print(f"{to_run} of {total} steps to run, about {clock(seconds)}")

    def start(self, step: Step, seconds: float | None, left: float | None) -> None:
        """Open the line of a step."""
        self._number += 1
        self._started = self._printed = time.monotonic()
        self._estimate, self._after = seconds, (left - seconds) if left is not None and seconds is not None else None
        if self.quiet:
            return
        label = f"[{self._number}/{self._total}] {step.id}"
        if self.console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self.console,
                transient=True,
            )
            self._live.start()
            self._task = self._live.add_task(label, total=1.0, note="", left=f"about {clock(left)} left in all")
        else:
            self.console.print(f"{label}: about {clock(seconds)}, {clock(left)} left in all", markup=False)

    def progress(self, step: Step, done: int, total: int, note: str) -> None:
        """Move the line; off a terminal, a line every 20 seconds."""
        if self.quiet or total <= 0:
            return
        now = time.monotonic()
        spent, share = now - self._started, done / total
        remains = spent / share - spent if share > 0.02 else max(0.0, (self._estimate or 0) - spent)
        everything = None if self._after is None else remains + self._after
        if self._live is not None and self._task is not None:
            self._live.update(
                self._task, completed=share, note=f"{done}/{total} {note}", left=f"{clock(everything)} left in all"
            )
        elif now - self._printed >= PLAIN_EVERY_S:
            self._printed = now
            self.console.print(
                f"    {step.id}: {done}/{total} {note}, {clock(remains)} left here, {clock(everything)} in all",
                markup=False,
            )

    def finish(self, step: Step, seconds: float) -> None:
        """Close the line with the seconds it took."""
        self._stop()
        if not self.quiet:
            self.console.print(f"[{self._number}/{self._total}] {step.id}: done in {seconds:.1f} s", markup=False)

    def fail(self, step: Step, error: EdgeDistillError) -> None:
        """Show the error at once, since the build may go on with other steps; but the first one not where it is raised after it."""
        self._stop()
        if not self.raised:
            show_error(error, self.console)
        self.raised = False

    def note(self, text: str) -> None:
        """Print a line above the progress."""
        console = self._live.console if self._live else self.console
        console.print(f"note: {text}", markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def show_error(error: EdgeDistillError, console: Console | None = None) -> None:
    """Print one error and what to do about it."""
    console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
    console.print(f"[red]error:[/red] {_escape(error.message if not hasattr(error, 'key') else str(error))}")
    if error.hint:
        console.print(f"  try: {_escape(error.hint)}")


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
