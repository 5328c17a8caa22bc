"""What a job would do, worked out without loading the model: rows, images, faults, tokens, disk, memory, time."""

from collections import Counter

from rich.console import Console

from tinysd_batch.config import Settings
from tinysd_batch.job.state.job import Job
from tinysd_batch.records import InvalidRow
from tinysd_batch.report.formatting import count, format_bytes, format_row_label, print_line, to_one_line
from tinysd_batch.report.plan.job_plan import JobPlan
from tinysd_batch.report.plan.token_counts import CountedRow
from tinysd_batch.report.reading_progress import ReadingProgress

LABEL_WIDTH = 14
MAX_ROW_CHARACTERS = 300  # of a row
MAX_SHOWN_ROWS = 10  # faults, cut prompts and weighted prompts, unless all are asked for


class PlanPrinter:
    """Prints rows worth a look as they are read, all with `verbose`, and at the end what they come to."""

    def __init__(self, console: Console, verbose: bool, progress: ReadingProgress) -> None:
        self.console = console
        self.verbose = verbose
        self.progress = progress
        self.seen: Counter[str] = Counter()
        # A row is a line of a terminal; in a file lines may be longer.
        self.max_characters = console.width if console.is_terminal else MAX_ROW_CHARACTERS

    def row(self, row: CountedRow | InvalidRow) -> None:
        kind = classify_row(row)
        self.seen[kind] += 1
        if self.verbose or (kind != "plain" and self.seen[kind] <= MAX_SHOWN_ROWS):
            with self.progress.hidden():
                print_line(self.console, self.line(row))

    def line(self, row: CountedRow | InvalidRow) -> str:
        if isinstance(row, InvalidRow):
            return f"{format_row_label(row.number, row.line)} cannot be made: {to_one_line(row.reason, 400)}"
        return to_one_line(row.line(), self.max_characters)

    def plan(self, job: Job, plan: JobPlan) -> None:
        hidden = sum(max(0, number - MAX_SHOWN_ROWS) for kind, number in self.seen.items() if kind != "plain")
        if hidden and not self.verbose:
            print_line(self.console, f"and {hidden:,} more like these; --verbose shows every row")
        for note in plan.notes:
            print_line(self.console, f"{job.manifest.name}: {note}")
        lines = {
            **(plan.answers.lines() if plan.answers else {}),
            "Rows": f"{plan.rows:,}"
            + (f", of which {plan.invalid_rows:,} cannot be made" if plan.invalid_rows else ""),
            "Images": f"{plan.images:,} in {count(plan.batches, 'batch', 'batches')}"
            + (f"; {plan.finished:,} are there already" if plan.finished else "")
            + (f"; {plan.redo:,} to be generated again: {plan.redo_reason}" if plan.redo else "")
            + format_reuse(job, plan),
            "Model": f"{job.model.name}, digest {job.model.digest[:10]}",
            "Sizes": told(plan.sizes),
            "Sampling": told(plan.samplings),
            "Tokens": f"{plan.longest_prompt_tokens:,} in the longest prompt, the model takes {plan.token_limit}"
            + format_token_advice(plan, job.settings),
            "Weighted": count(plan.weighted_rows, "row"),
            "Disk": f"some {format_bytes(plan.disk_bytes)} to be written, {format_bytes(plan.free_bytes)} free"
            + ("" if plan.fits_disk else ": not enough"),
            **(plan.memory.lines() if plan.memory else {}),
        }
        if plan.carried_columns:
            lines["Carried"] = ", ".join(
                to_one_line(name, 40)
                + (f" (did you mean {plan.near_misses[name]}?)" if name in plan.near_misses else "")
                for name in plan.carried_columns[:MAX_SHOWN_ROWS]
            ) + (
                f" and {len(plan.carried_columns) - MAX_SHOWN_ROWS:,} more"
                if len(plan.carried_columns) > MAX_SHOWN_ROWS
                else ""
            )
        lines["Job folder"] = str(job.folder)
        for name, line in lines.items():
            print_line(self.console, f"{name:<{LABEL_WIDTH}} {line}")


def classify_row(row: CountedRow | InvalidRow) -> str:
    if isinstance(row, InvalidRow):
        return "fault"
    return "cut" if row.is_truncated else "marked" if row.prompt.has_weights else "plain"


def format_reuse(job: Job, plan: JobPlan) -> str:
    if job.reuse is None:
        return ""
    left = plan.images - plan.finished - plan.reusable
    return f"; {plan.reusable:,} can be reused from {job.reuse}, {left:,} are to be drawn"


def told(counter: Counter[str]) -> str:
    """The most frequent first."""
    shown = [
        f"{name} ({number:,})" if len(counter) > 1 else name for name, number in counter.most_common(MAX_SHOWN_ROWS)
    ]
    return ", ".join(shown) + (f" and {len(counter) - MAX_SHOWN_ROWS:,} more" if len(counter) > MAX_SHOWN_ROWS else "")


def format_token_advice(plan: JobPlan, settings: Settings) -> str:
    if settings.long_prompts:
        return " at a time"
    return f"; {count(plan.cut_rows, 'row')} will be cut, --long-prompts keeps all" if plan.cut_rows else ""
