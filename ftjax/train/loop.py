"""The training loop.

It never waits for the step in flight: the metrics of an update are fetched after the next one is dispatched, and checkpoints
are written while training continues.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ftjax.data.pipeline import Split
from ftjax.distributed import store
from ftjax.distributed.ending import asked_to_stop
from ftjax.errors import Interrupted, UserError
from ftjax.hub.output import write_output
from ftjax.long_steps import KEPT, counted, long_step
from ftjax.mesh import parts
from ftjax.objectives import objective_of
from ftjax.train.announce import announce, next_commands
from ftjax.train.checkpoint import Checkpoints
from ftjax.train.folder import bring_best_back, keep_best, tracked_id
from ftjax.train.layout import BatchLayout
from ftjax.train.log import Log, Update
from ftjax.train.means import Means
from ftjax.train.observer import Observer
from ftjax.train.profile import Profile
from ftjax.train.progress import Progress, say
from ftjax.train.record import finished_at, split_record, write_finished, write_record
from ftjax.train.reference import MovingReference
from ftjax.train.same_run import Documents
from ftjax.train.setup import Setup, compile_steps, rows_at_a_time
from ftjax.train.source import BatchSource
from ftjax.train.step import abstract_state, init_state
from ftjax.train.track import Heard, Tracker
from ftjax.train.watch import BestMetric, Diverged, LossWatch, MetricWatch, OverfitWatch, why_skipped


class Run:
    """One start of a run: trains, evaluates, saves, and writes the run folder (docs)."""

    def __init__(
        self, setup: Setup, tokenizer: Any, source: BatchSource, validation: Split | None,
        checkpoints: Checkpoints, documents: Documents, command: str, observer: Observer | None = None,
        heard: Heard | None = None,
    ):  # fmt: skip
        self.setup, self.tokenizer, self.batches, self.validation = setup, tokenizer, source, validation
        self.config, self.command, self.observer, self.heard = setup.config, command, observer, heard
        self.evaluates = validation is not None or observer is not None
        self.checkpoints, self.folder = checkpoints, Path(setup.config.output_dir)
        options = self.options = setup.config.training
        steps = source.steps or options.max_steps
        assert steps is not None, "a source without an end needs training.max_steps"
        self.documents, self.total = documents, steps
        self.train_step, self.eval_step, self.optimizer, self.schedule = compile_steps(setup, self.total)
        self.profile = Profile(options.profile_steps, self.folder / "profile", self.total)
        self.watch = LossWatch(options.loss_spike_factor, options.max_skipped_updates)
        self.pending: list[Update] = []  # in order of dispatch
        self.best = BestMetric(
            options.metric_for_best_model,
            options.best_is_greatest,
            options.early_stopping_patience,
            options.early_stopping_threshold,
        )
        self.overfit, self.metric_watch = OverfitWatch(), MetricWatch()
        self.log = Log(
            setup.mesh, setup.train_flops, self.total, source.steps_per_epoch, options.logging_steps, self.schedule, self.config
        )
        self.key = jax.random.key(options.seed)
        moving = objective_of(self.config).moving(self.config.objective)
        self.moving = None if moving is None else MovingReference(setup.reference, *moving)
        self.interrupted: str | None = None
        self.compiled: set[tuple[int, ...]] = set()  # batch shapes that all processes have compiled
        self.called: set[tuple[int, ...]] = set()  # batch shapes that an update has had

    # ---- start, middle, end ----

    def go(self) -> None:
        first = self.begin() if self.checkpoints.latest is None else self.restore()
        self.tracker = Tracker(
            self.folder, self.options.report_to, self.config.model_dump(mode="json"),
            active=jax.process_index() == 0, resume_from=first, run_id=tracked_id(self.config, first),
            heard=self.heard,
        )  # fmt: skip
        self.announce(first)
        # With several processes, JAX handles SIGTERM: it makes them all agree on the step after which they stop.
        numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            numbers = ()  # only the main thread may handle signals
        handlers = {number: signal.signal(number, self.on_signal) for number in numbers}
        try:
            done = self.loop(first)
        except Exception:
            if not store.several():  # with several processes, closing would wait for others that may be gone
                with suppress(Exception):  # the first error counts
                    self.checkpoints.close()  # completes a save, so that the folder can be used again in this process
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.profile.close()
            self.tracker.close()
        if self.interrupted:
            self.checkpoints.close()
            where = ", on all hosts" if store.several() else ""
            told = f"{self.interrupted}: saved step {done} of {self.total} in {self.folder}. To resume{where}: {self.command}"
            say(told)
            raise Interrupted(told)
        self.checkpoints.close()
        self.finish(first, done)

    def loop(self, first: int) -> int:
        """Run the updates `first + 1` to the last; return the number of the last one done."""
        step = first
        if self.best.exhausted:
            self.say_early_stop(step)
            return step
        with Progress(self.total, first) as progress:
            while step < self.total:
                batch = self.next_batch(step, progress)
                limit = np.float32(self.watch.limit(step + 1))
                self.compile_together(batch, limit)
                self.look()
                with self.profile.step(step + 1), self.compiling(batch):
                    self.state, metrics = self.train_step(self.state, self.setup.frozen, batch, self.key, limit)
                step += 1
                if self.moving is not None:
                    self.setup.frozen = self.moving.after(step, self.state.params, self.setup.frozen)
                self.profile.dispatched(step, metrics)
                self.pending.append(Update(step, metrics, float(limit), batch=self.batches.metrics, texts=self.batches.texts))
                if self.batches.follows:
                    self.wait(self.pending[-1])
                if jax.process_count() > 1 and asked_to_stop(step):
                    self.interrupted = signal.SIGTERM.name
                if self.settle(step, progress):
                    break
        return step

    def next_batch(self, step: int, progress: Progress) -> dict[str, jax.Array]:
        """Return the next batch on the devices. If the source fails, save the state before it, so that nothing is lost."""
        try:
            batch = self.batches.next(self.state.params)
        except UserError:
            while self.pending:
                self.read_next(progress)
            if step:
                self.save(step)
                self.checkpoints.wait()
            raise
        if self.batches.trouble:
            self.warn(step + 1, self.batches.trouble)
        self.began = time.perf_counter()
        return self.batches.layout.arrays(batch)

    def wait(self, update: Update) -> None:
        """Wait for an update, on which the next batch depends, and take its time."""
        jax.block_until_ready(update.metrics.loss)
        update.ended = time.perf_counter()
        update.batch = {**update.batch, "time/update": (update.ended - self.began, 1.0)}

    def warn(self, step: int, text: str) -> None:
        say(f"warning: {text}")
        self.tracker.warn(step, text)

    def settle(self, step: int, progress: Progress) -> bool:
        """Read, evaluate, save and stop, in this order, after update `step` is dispatched; return whether the loop ends.

        The previous update is always read, and this one too before an evaluation, a save or a stop: so whatever is evaluated or
        saved has been checked, and its metrics are saved with it.

        Raises Diverged, after saving, if too many updates in a row were skipped.
        """
        last = step == self.total
        evaluate = self.evaluates and (last or (self.options.eval_steps is not None and step % self.options.eval_steps == 0))
        save = last or step % self.options.save_steps == 0
        while len(self.pending) > 1:
            self.read_next(progress)
        while self.pending and (evaluate or save or self.watch.gives_up):
            self.read_next(progress)
        # After divergence there is nothing to evaluate.
        if evaluate and not self.diverged:
            self.evaluate(step, progress)
        stop = self.interrupted is not None  # a signal may come at any time; check for it only here
        while self.pending and stop:
            self.read_next(progress)
        early, diverged = self.best.exhausted and not last, self.diverged
        if diverged:
            row = self.watch.in_a_row
            self.watch.forget()
        if save or stop or early or diverged:
            self.save(step)
        if diverged:
            self.checkpoints.wait()
            raise Diverged(step, row, self.log.why)
        if early:
            self.say_early_stop(step)
        return stop or last or early

    @property
    def diverged(self) -> bool:
        """Whether to give up: too many updates in a row were skipped, or all of a whole run."""
        return self.watch.gives_up or self.watch.skipped == self.total

    def say_early_stop(self, step: int) -> None:
        say(f"early stop at step {step}: {self.best.name} has not improved since step {self.best.step}")

    def finish(self, first: int, step: int) -> None:
        """Write `final/`, unless it is already up to date, and print the next commands."""
        there = first == step and finished_at(self.folder) == step and (self.folder / "final").is_dir()
        if not store.from_first("finished", there):
            self.write("final", step, {})
            if jax.process_index() == 0:
                write_finished(self.folder, step)
        if jax.process_index() == 0:
            say(*next_commands(self.folder, self.config))

    # ---- one update, one evaluation ----

    @contextmanager
    def compiling(self, batch: Mapping[str, jax.Array]) -> Iterator[None]:
        """Say that a batch shape is compiled, where it takes long."""
        shape = batch["tokens"].shape
        if shape in self.called:
            yield
            return
        with long_step("compiling the update", hint=KEPT):
            yield
        self.called.add(shape)

    def compile_together(self, batch: Mapping[str, jax.Array], limit: np.float32) -> None:
        """Compile a new batch shape on all processes before any of them runs it.

        On CPUs a collective waits at most 30 seconds for the last process, and hosts may differ by more in compile time.
        """
        shape = batch["tokens"].shape
        if store.several() and shape not in self.compiled:
            with long_step("compiling the update on all processes", hint=KEPT):
                self.train_step.lower(self.state, self.setup.frozen, batch, self.key, limit).compile()
            store.wait_for_all("compiled")
            self.compiled.add(shape)

    def look(self) -> None:
        """Record the time of updates that are done, before the next is dispatched: dispatch may block on CPUs."""
        for update in self.pending:
            if update.ended is None and update.metrics.loss.is_ready():
                update.ended = time.perf_counter()

    def read_next(self, progress: Progress) -> None:
        update = self.pending.pop(0)
        self.read(update.step, update, progress)

    def read(self, step: int, update: Update, progress: Progress) -> None:
        """Fetch an update's metrics, and log a row when one is due."""
        read = self.log.read(update)
        self.watch.see(step, read.loss, read.good)
        if not read.good:
            self.log.why = why_skipped(read.loss, read.grad_norm, update.limit)
            self.warn(step, f"update {step} is not applied: {self.log.why}; {self.watch.skipped} skipped so far")
        progress.update(step, read.loss, read.tokens, update.ended)
        if self.log.is_time(step):
            row = self.log.row(step, read, self.watch.skipped, progress.rate())
            if warning := self.metric_watch.see(self.log.warning(row)):
                self.warn(step, warning)
            self.tracker.log(step, row)
            self.tracker.log_texts(step, "train/completions", update.texts)
            progress.report(step, row)

    def evaluate(self, step: int, progress: Progress) -> None:
        """Compute loss and metrics on the validation set, call the observer, and keep the best checkpoint."""
        start, row = time.perf_counter(), self.losses() if self.validation is not None else {}
        if self.observer is not None:
            seen = self.observer({**self.setup.frozen, **self.state.params})
            row |= seen.metrics
            self.tracker.log_texts(step, "eval/generations", seen.texts)
        row["eval/seconds"] = time.perf_counter() - start
        self.tracker.log(step, row)
        progress.report(step, row)
        progress.skip_time()
        if "eval/loss" in row:
            warning = self.overfit.see(step, self.log.since_eval["loss"], row["eval/loss"])
            if warning:
                self.warn(step, warning)
        self.log.since_eval.clear()
        measured = {**self.log.latest, **row}
        if self.best.name in ("eval/loss", "eval/reward") and self.best.name not in measured and self.best.patience is None:
            return  # generated answers alone do not tell which step is best
        if self.best.see(step, measured):
            self.write("best", step, row)

    def losses(self) -> dict[str, float]:
        """Return the loss and metrics on the whole validation set."""
        rows = self.options.eval_batch_size or rows_at_a_time(self.config, parts(self.setup.mesh.shape, "batch"))
        layout = BatchLayout(self.setup.mesh, rows)
        batches = self.validation.batches(
            rows, seed=0, shuffle=False, epochs=1, rows=layout.own, width_multiple=layout.length_parts
        )
        means = Means()
        count = -(-len(batches.plan(0)) // rows)
        for batch in counted("evaluating", batches, count, "batches"):
            totals = self.eval_step(self.state.params, self.setup.frozen, layout.arrays(batch))
            means.add(jax.tree.map(float, {"loss": (totals.loss, totals.weight), **totals.metrics}))
        found = {"loss": means["loss"], **means.means()}
        derived = objective_of(self.config).derived(self.config.objective, found)
        found = {"loss": found.pop("loss")} | derived | {name: value for name, value in found.items() if name not in derived}
        return {f"eval/{name}": value for name, value in found.items()}

    # ---- checkpoints and output ----

    def begin(self) -> int:
        """Initialise the state of a new run; takes ownership of the set-up's parameters."""
        self.state = init_state(self.setup.params, self.optimizer)
        self.setup.params = {}
        return 0

    def save(self, step: int) -> None:
        if self.checkpoints.latest == step:
            return
        meta = {
            "step": step,
            "data": self.batches.get_state(),
            "best": self.best.state(),
            "watch": self.watch.state(),
            "log": self.log.state(),
            "overfit": self.overfit.state(),
            "metric_watch": self.metric_watch.state(),
            "documents": self.documents,
        }
        copies = None if self.moving is None else self.moving.copies(self.setup.frozen)
        self.checkpoints.save(step, self.state, meta, copies)

    def restore(self) -> int:
        """Restore the newest checkpoint, which replaces the loaded parameters."""
        like = abstract_state(self.setup.params, self.optimizer)
        for leaf in self.setup.params.values():
            leaf.delete()
        self.setup.params = {}
        shapes = {} if self.moving is None else self.moving.shapes(self.setup.frozen)
        self.state, meta, copies = self.checkpoints.restore(like, shapes)
        self.setup.frozen |= copies
        if meta["step"] > self.total:
            raise UserError(
                f"{self.checkpoints.folder} has {meta['step']} updates, and with these documents the run is over after "
                f"{self.total}; set training.max_steps or num_train_epochs to more, or choose another output_dir"
            )
        self.batches.set_state(meta["data"])
        self.best.load(meta["best"])
        if self.best.value is not None and (lost := bring_best_back(self.folder, self.checkpoints.folder)):
            say(f"warning: {lost}")
            self.best.value = None
        self.watch.load(meta["watch"])
        self.log.load(meta["log"])
        self.overfit.load(meta["overfit"])
        self.metric_watch.load(meta.get("metric_watch", 0))
        return meta["step"]

    def write(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write `final/` or `best/`: a complete, loadable output."""
        write_output(
            self.folder / name, self.setup.config, self.setup.model, {**self.setup.frozen, **self.state.params}, self.tokenizer,
            self.setup.source, step=step, data=self.batches.report(), metrics=metrics,
        )  # fmt: skip
        if name == "best" and self.options.checkpoint_dir:
            keep_best(self.folder, self.checkpoints.folder)

    def on_signal(self, number: int, frame: Any) -> None:
        if self.interrupted:  # a second signal stops at once
            raise KeyboardInterrupt
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.interrupted = signal.Signals(number).name

    def announce(self, first: int) -> None:
        if jax.process_index():
            return
        options = {"first": first, "steps": self.total, "epoch_steps": self.batches.steps_per_epoch}
        data = {"train": self.batches.record(), "validation": self.validation and split_record(self.validation)}
        write_record(self.folder, self.setup, data, self.documents, **options)
        announce(self.setup, self.batches.report(), self.log.flops, **options)
        if first:
            say(f"resuming from step {first} of {self.total}")
        else:
            say(*self.batches.example(self.config, self.tokenizer))
