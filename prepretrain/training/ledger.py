"""Keeps a run's books: a row of metrics where one is due, how fast it is, which images were replaced."""

import math
import time
from collections import Counter
from typing import Any

from prepretrain.distributed import group as distributed
from prepretrain.training import durations
from prepretrain.training.log import Metrics, Progress
from prepretrain.training.outcome import Agreed


class Ledger:
    """What is noted of a run's steps, one after another; on every process, of which rank 0 writes."""

    def __init__(
        self,
        metrics: Metrics,
        progress: Progress,
        bad: Counter[str],
        *,
        steps: int,
        log_every: int,
        batch_size: int,
        max_bad: float,
    ):
        """bad: the images replaced so far, by cause."""
        self.metrics, self.progress, self.bad = metrics, progress, bad
        self.steps, self.log_every = steps, log_every
        self.batch_size, self.max_bad = batch_size, max_bad
        self.meter = Meter(batch_size)
        self.before = metrics.seconds if distributed.is_main() else 0.0
        # images replaced that others do not know of yet: all, and here
        self.count, self.mine = 0, []

    def note(
        self, step: int, rate: float, agreed: Agreed, replaced: list[dict], event: str | None
    ) -> None:
        """Notes a step, and logs a row if one is due or there is an event. step: with it, so many were
        taken. replaced: images of this process."""
        self.meter.step()
        self.progress.advance()
        self.count += agreed.bad
        self.mine += [{"step": step, **one} for one in replaced]
        if event is None and not durations.due(step, self.log_every, self.steps):
            return
        self.share_bad(step)
        row = {"step": step, "images": step * self.batch_size}
        row |= {"seconds": round(self.before + self.meter.total(), 3), **agreed.figures}
        row |= {"lr": rate, "grad_norm": agreed.norm, **self.meter.rates()}
        row |= {"bad_images": sum(self.bad.values())} if self.bad else {}
        row |= {"event": event} if event else {}
        self.metrics.write(
            {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
        )
        self.progress.show(*_texts(row, self.steps))

    def share_bad(self, step: int) -> None:
        """Tells all processes which images were replaced since the last call, which they make
        together. Raises ValueError if there are too many of them after so many steps.

        Not in every step: of thousands of images one is nearly always bad, and the names go over
        gloo from each process to each.
        """
        if self.count:
            everywhere = [one for part in distributed.all_gather_object(self.mine) for one in part]
            self.count, self.mine = 0, []
            self.bad.update(one["cause"] for one in everywhere)
            self.metrics.quarantine(sorted(everywhere, key=lambda one: one["step"]))
        check_bad(self.bad, step * self.batch_size, self.max_bad)


def check_bad(bad: Counter[str], images: int, limit: float) -> None:
    """Raises ValueError if more than a share of the images were replaced."""
    count = sum(bad.values())
    if count > max(limit * images, 10):  # ten may happen in the first steps of any run
        causes = ", ".join(f"{n} {cause}" for cause, n in bad.most_common())
        raise ValueError(
            f"data.max_bad: {count} bad images were replaced ({causes}) to fill {images} places, more than "
            f"the share {limit}. Look at them in the log; clean the data, or raise data.max_bad."
        )


class Meter:
    """Images a second, and the share of time spent waiting for data, since they were last read."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.begin = self.since = time.perf_counter()
        self.waited, self.steps = 0.0, 0

    def waiting(self) -> "_Waiting":
        """What to be in while waiting for data."""
        return _Waiting(self)

    def step(self) -> None:
        """A step is done."""
        self.steps += 1

    def total(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.begin

    def rates(self) -> dict[str, float]:
        """Both, which begin anew."""
        now = time.perf_counter()
        spent = max(now - self.since, 1e-9)
        rates = {
            "images_per_second": round(self.steps * self.batch_size / spent, 2),
            "data_wait": round(self.waited / spent, 4),
        }
        self.since, self.waited, self.steps = now, 0.0, 0
        return rates


class _Waiting:
    def __init__(self, meter: Meter):
        self.meter = meter

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        self.meter.waited += time.perf_counter() - self.start


def _texts(row: dict[str, Any], steps: int) -> tuple[str, str]:
    """The figures behind a bar, and as a plain line with the time left."""
    speed = row["images_per_second"]
    left = (steps / row["step"] - 1) * row["images"] / speed if speed else math.inf
    bar = f"{speed:.0f} images/s, loss {row['loss']:.4f}, waits for data {row['data_wait']:.0%}"
    bar += f", {row['event']}" if "event" in row else ""
    return (
        bar,
        f"step {row['step']}/{steps}  {bar}  lr {row['lr']:.2e}  left {time.strftime('%H:%M:%S', time.gmtime(left))}",
    )
