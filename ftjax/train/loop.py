"""`ftjax train`: the loop.

It never waits for the step in flight: the metrics of one update are read after the next is dispatched, and checkpoints
are written while training goes on.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from ftjax.compile_cache import keep_compiled_programs
from ftjax.config import Config, TrainingConfig
from ftjax.data.batch import BatchIterator
from ftjax.data.classes import with_labels
from ftjax.data.labels import Labels
from ftjax.data.pipeline import Split, load_splits
from ftjax.distributed import store
from ftjax.distributed.agree import agree
from ftjax.distributed.ending import asked_to_stop, together
from ftjax.errors import UserError
from ftjax.flops import peak_of, train_flops
from ftjax.hub.load import positions_of
from ftjax.hub.output import write_output
from ftjax.hub.tokenizer import load_tokenizer
from ftjax.hub.vocabulary import embeddings_of
from ftjax.objectives import classification
from ftjax.train.announce import announce, next_commands, show_example
from ftjax.train.checkpoint import Checkpoints
from ftjax.train.folder import bring_best_back, checkpoints_of, keep_best, open_run_folder, wandb_id
from ftjax.train.layout import BatchLayout
from ftjax.train.lock import alone_in
from ftjax.train.profile import Profile
from ftjax.train.progress import Progress, say
from ftjax.train.record import finished_at, peak_memory_gib, write_finished, write_record
from ftjax.train.same_run import Documents, facts_to_agree, fingerprints, refuse_other_documents
from ftjax.train.setup import Setup, compile_steps, prepare
from ftjax.train.step import StepMetrics, abstract_state, init_state
from ftjax.train.track import Observation, Tracker, check_report_to
from ftjax.train.watch import BestMetric, Diverged, LossWatch, OverfitWatch, why_skipped


class Observer(Protocol):
    """What is measured of a model while it trains, besides its loss."""

    @property
    def facts(self) -> dict[str, Any]:
        """What must be equal on all processes, as JSON: prompts and rows."""

    def __call__(self, params: Mapping[str, jax.Array]) -> Observation:
        """Args: params: all of them, trained and frozen."""


def train(
    config: Config,
    *,
    command: str = "the same command",
    make_observer: Callable[[Setup, Any, Split | None], Observer | None] | None = None,
) -> None:
    """Fine-tune from start, or from the newest checkpoint in `output_dir`, to the end; writes the run folder.

    Args:
        command: what a person types to go on with this run, for messages.
        make_observer: of set-up, tokenizer and validation data; what it gives is called at every evaluation.

    Raises UserError for whatever in the configuration, the model or the data is wrong; of several processes each then ends
    the same way (`ftjax.distributed.ending`).
    """
    with together(), ExitStack() as held:
        keep_compiled_programs()
        agree("the number of devices", {"devices": jax.local_device_count(), "platform": jax.default_backend()})
        config = with_labels(config)
        check_report_to(config.training.report_to)
        held.enter_context(alone_in(config))
        open_run_folder(config)
        checkpoints = Checkpoints(checkpoints_of(config), config.training.save_total_limit)
        tokenizer = load_tokenizer(config.model)
        train_split, validation = load_splits(
            config.data, tokenizer, seed=config.training.seed, labels=Labels.of(config.objective),
            positions=positions_of(config.model.path, config.model.revision),
        )  # fmt: skip
        embeddings = embeddings_of(config)
        for split in (train_split, validation):
            if split is not None:
                split.refuse_unknown(embeddings, tokenizer)
        documents = fingerprints(train_split, validation)
        refuse_other_documents(checkpoints, documents, config)
        steps = steps_of_run(train_split, config.training)
        if store.several():
            agree("this run", facts_to_agree(config, documents, steps, checkpoints.latest))
        setup = prepare(config)
        with jax.set_mesh(setup.mesh):
            observer = make_observer(setup, tokenizer, validation) if make_observer else None
            agree("what is evaluated while training", observer.facts if observer is not None else {})
            check_early_stopping(config, evaluates=validation is not None or observer is not None)
            Run(setup, tokenizer, train_split, validation, checkpoints, documents, steps, command, observer).go()


def check_early_stopping(config: Config, *, evaluates: bool) -> None:
    """UserError where a run is to stop by an evaluation that never comes."""
    options = config.training
    if options.early_stopping_patience is None:
        return
    if options.eval_steps is None:
        raise UserError(
            "training.early_stopping_patience: it counts evaluations, and there are none before the end; set eval_steps"
        )
    if not evaluates:
        raise UserError(
            "training.early_stopping_patience: there is nothing to evaluate; set data.validation (or data.validation_split), "
            "or evaluate.training_rows with evaluate.data"
        )


def steps_of_run(split: Split, options: TrainingConfig) -> int:
    """Updates of the whole run; epochs may pack into different numbers of rows."""
    if options.max_steps:
        return options.max_steps
    whole = math.ceil(options.num_train_epochs)
    each = [math.ceil(split.rows_per_epoch(epoch) / options.global_batch_size) for epoch in range(whole)]
    return max(1, math.ceil(sum(each[:-1]) + each[-1] * (options.num_train_epochs - whole + 1)))


@dataclass
class Update:
    """One that was dispatched, and whose metrics have not been read."""

    step: int
    metrics: StepMetrics
    limit: float  # of its loss
    ended: float | None = None  # when it was seen to be done (`time.perf_counter`)


class Run:
    """One run of the loop; what it prints and writes is the run folder of the documentation."""

    def __init__(
        self, setup: Setup, tokenizer: Any, split: Split, validation: Split | None, checkpoints: Checkpoints,
        documents: Documents, steps: int, command: str, observer: Observer | None = None,
    ):  # fmt: skip
        self.setup, self.tokenizer, self.split, self.validation = setup, tokenizer, split, validation
        self.config, self.command, self.observer = setup.config, command, observer
        self.evaluates = validation is not None or observer is not None
        self.checkpoints, self.folder = checkpoints, Path(setup.config.output_dir)
        options = self.options = setup.config.training
        self.documents, self.total = documents, steps
        self.epoch_steps = math.ceil(split.rows_per_epoch(0) / options.global_batch_size)
        self.train_step, self.eval_step, self.optimizer, self.schedule = compile_steps(setup, self.total)
        self.profile = Profile(options.profile_steps, self.folder / "profile", self.total)
        self.flops, self.peak = train_flops(setup.model), peak_of(list(setup.mesh.devices.flat))
        self.layout = BatchLayout(setup.mesh, options.global_batch_size, options.gradient_accumulation_steps)
        self.batches: BatchIterator = split.batches(
            options.global_batch_size, seed=options.seed, shuffle=True, epochs=None,
            rows=self.layout.own, width_multiple=self.layout.length_parts,
        )  # fmt: skip
        self.watch = LossWatch(options.loss_spike_factor, options.max_skipped_updates)
        self.pending: list[Update] = []  # in their order
        self.best = BestMetric(
            options.metric_for_best_model,
            options.best_is_greatest,
            options.early_stopping_patience,
            options.early_stopping_threshold,
        )
        self.overfit = OverfitWatch()
        self.window = np.zeros(2)  # sums of loss * weight and of weight since the last log
        self.since_eval = np.zeros(2)  # and since the last evaluation
        self.counted = np.zeros(2)  # FLOPs and tokens since the last log
        self.latest: dict[str, float] = {}  # metrics of the last log
        self.key = jax.random.key(options.seed)
        self.interrupted: str | None = None
        self.why = ""  # the latest update that was skipped, in words
        self.compiled: set[tuple[int, ...]] = set()  # shapes of batches whose program all processes have

    # ---- start, middle, end ----

    def go(self) -> None:
        first = self.begin() if self.checkpoints.latest is None else self.restore()
        self.tracker = Tracker(
            self.folder, self.options.report_to, self.config.model_dump(mode="json"),
            active=jax.process_index() == 0, resume_from=first, run_id=wandb_id(self.config, first),
        )  # fmt: skip
        self.announce(first)
        # With several processes SIGTERM is JAX's, which has them all agree on the step after which they stop.
        numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
        handlers = {number: signal.signal(number, self.on_signal) for number in numbers}
        try:
            done = self.loop(first)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.profile.close()
            self.tracker.close()
        if self.interrupted:
            self.checkpoints.close()
            where = ", on all hosts" if store.several() else ""
            say(f"{self.interrupted}: saved step {done} of {self.total} in {self.folder}. To go on{where}: {self.command}")
            raise SystemExit(1)
        self.checkpoints.close()
        self.finish(first, done)

    def loop(self, first: int) -> int:
        """Updates `first + 1` to the last; returns the number of the last one done."""
        step = first
        if self.best.exhausted:
            self.say_early_stop(step)
            return step
        with Progress(self.total, first) as progress:
            while step < self.total:
                batch = self.layout.arrays(next(self.batches))
                limit = np.float32(self.watch.limit(step + 1))
                self.compile_together(batch, limit)
                self.look()
                with self.profile.step(step + 1):
                    self.state, metrics = self.train_step(self.state, self.setup.frozen, batch, self.key, limit)
                step += 1
                self.profile.dispatched(step, metrics)
                self.pending.append(Update(step, metrics, float(limit)))
                if jax.process_count() > 1 and asked_to_stop(step):
                    self.interrupted = signal.SIGTERM.name
                if self.settle(step, progress):
                    break
        return step

    def settle(self, step: int, progress: Progress) -> bool:
        """What follows the dispatch of update `step`, in this order: read, evaluate, save, end. Whether the loop ends here.

        The update before is read always, and this one too where anything else follows: what is evaluated or saved has been
        looked at, and all that was counted until then is saved with it.

        Raises Diverged, after saving, where too many updates in a row were skipped.
        """
        last = step == self.total
        evaluate = self.evaluates and (last or (self.options.eval_steps is not None and step % self.options.eval_steps == 0))
        save = last or step % self.options.save_steps == 0
        while len(self.pending) > 1:
            self.read_next(progress)
        while self.pending and (evaluate or save or self.watch.gives_up):
            self.read_next(progress)
        # Where it is broken there is nothing to evaluate.
        if evaluate and not self.diverged:
            self.evaluate(step, progress)
        stop = self.interrupted is not None  # a signal may come at any time, and is looked for here alone
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
            raise Diverged(step, row, self.why)
        if early:
            self.say_early_stop(step)
        return stop or last or early

    @property
    def diverged(self) -> bool:
        """Whether it is time to give up: too many updates in a row were skipped, or all of a whole run."""
        return self.watch.gives_up or self.watch.skipped == self.total

    def say_early_stop(self, step: int) -> None:
        say(f"early stop at step {step}: {self.best.name} has not improved since step {self.best.step}")

    def finish(self, first: int, step: int) -> None:
        """Write `final/`, unless this start had nothing to add to it, and say what to do next."""
        there = first == step and finished_at(self.folder) == step and (self.folder / "final").is_dir()
        if not store.from_first("finished", there):
            self.write("final", step, {})
            if jax.process_index() == 0:
                write_finished(self.folder, step)
        if jax.process_index() == 0:
            say(*next_commands(self.folder, self.config))

    # ---- one update, one evaluation ----

    def compile_together(self, batch: Mapping[str, jax.Array], limit: np.float32) -> None:
        """With several processes: none runs a new program before all have compiled it.

        On CPUs a transfer gives the last process 30 seconds to come, and one host may compile that much longer than another.
        """
        shape = batch["tokens"].shape
        if store.several() and shape not in self.compiled:
            self.train_step.lower(self.state, self.setup.frozen, batch, self.key, limit).compile()
            store.wait_for_all("compiled")
            self.compiled.add(shape)

    def look(self) -> None:
        """Note the time of updates that are done already, before the next is dispatched: that may wait for it on CPUs."""
        for update in self.pending:
            if update.ended is None and update.metrics.loss.is_ready():
                update.ended = time.perf_counter()

    def read_next(self, progress: Progress) -> None:
        update = self.pending.pop(0)
        self.read(update.step, update, progress)

    def read(self, step: int, update: Update, progress: Progress) -> None:
        """Fetch an update's metrics; log them where it is time."""
        values = (np.asarray(value).item() for value in update.metrics)
        loss, weight, tokens, flops, grad_norm, update_norm, good = values
        self.watch.see(step, loss, good)
        if good:
            self.window += (loss * weight, weight)
            self.since_eval += (loss * weight, weight)
        else:
            self.why = why_skipped(loss, grad_norm, update.limit)
            warning = f"update {step} is not applied: {self.why}; {self.watch.skipped} skipped so far"
            say(f"warning: {warning}")
            self.tracker.warn(step, warning)
        self.counted += (flops, tokens)
        progress.update(step, loss, tokens, update.ended)
        if step % self.options.logging_steps == 0 or step == self.total:
            row = {
                # Of the updates that were applied; without any, there is none.
                **({"train/loss": self.window[0] / max(self.window[1], 1e-9)} if good or self.window[1] else {}),
                "train/learning_rate": float(self.schedule(step - 1 - self.watch.skipped)),
                **({"train/grad_norm": grad_norm, "train/update_norm": update_norm} if good else {}),
                "train/trained_tokens": weight,
                "train/skipped_updates": self.watch.skipped,
                **self.speed(progress.rate()),
                "train/peak_memory_gib": peak_memory_gib(),
                "train/epoch": step / self.epoch_steps,
            }
            self.window[:] = self.counted[:] = 0
            self.latest |= row
            self.tracker.log(step, row)
            progress.report(step, row)

    def speed(self, tokens_per_second: float) -> dict[str, float]:
        """What a rate means for each device; MFU (`ftjax.flops`) where the chip is known."""
        devices = self.setup.mesh.size
        flops = tokens_per_second * self.counted[0] / max(self.counted[1], 1)
        row = {
            "train/tokens_per_second": tokens_per_second,
            "train/tokens_per_second_per_device": tokens_per_second / devices,
            "train/tflops_per_second_per_device": flops / devices / 1e12,
        }
        return row | ({"train/mfu": flops / self.peak} if self.peak else {})

    def evaluate(self, step: int, progress: Progress) -> None:
        """Loss and token accuracy over the whole validation set, and what the observer sees; keeps the best."""
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
            warning = self.overfit.see(step, self.since_eval[0] / max(self.since_eval[1], 1e-9), row["eval/loss"])
            if warning:
                say(f"warning: {warning}")
                self.tracker.warn(step, warning)
        self.since_eval[:] = 0
        measured = {**self.latest, **row}
        if self.validation is None and self.best.name == "eval/loss" and self.best.patience is None:
            return  # answers to prompts alone say nothing of which step is the best
        if self.best.see(step, measured):
            self.write("best", step, row)

    def losses(self) -> dict[str, float]:
        """Over the whole validation set."""
        options = self.options
        rows = options.eval_batch_size or options.global_batch_size // options.gradient_accumulation_steps
        layout = BatchLayout(self.setup.mesh, rows)
        batches = self.validation.batches(
            rows, seed=0, shuffle=False, epochs=1, rows=layout.own, width_multiple=layout.length_parts
        )
        sums = np.zeros(3)
        for batch in batches:
            sums += np.array(self.eval_step(self.state.params, self.setup.frozen, layout.arrays(batch)), np.float64)
        weight = max(sums[1], 1e-9)
        return classification.named(self.setup.model.config, sums[0] / weight, sums[2] / weight)

    # ---- what is kept ----

    def begin(self) -> int:
        """The state of a new run; it takes the parameters over from the set-up."""
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
            "window": self.window.tolist(),
            "since_eval": self.since_eval.tolist(),
            "latest": self.latest,
            "overfit": self.overfit.state(),
            "documents": self.documents,
        }
        self.checkpoints.save(step, self.state, meta)

    def restore(self) -> int:
        """The state of the newest checkpoint, in the place of the parameters that were loaded."""
        like = abstract_state(self.setup.params, self.optimizer)
        for leaf in self.setup.params.values():
            leaf.delete()
        self.setup.params = {}
        self.state, meta = self.checkpoints.restore(like)
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
        if "watch" in meta:  # older checkpoints have none
            self.watch.load(meta["watch"])
        self.window[:] = meta["window"]
        self.since_eval[:] = meta["since_eval"]
        self.latest = meta["latest"]
        self.overfit.load(meta["overfit"])
        return meta["step"]

    def write(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        """`final/` or `best/`: a complete, loadable output."""
        write_output(
            self.folder / name, self.setup.config, self.setup.model, {**self.setup.frozen, **self.state.params}, self.tokenizer,
            self.setup.source, step=step, data=self.split.report.lines(), metrics=metrics,
        )  # fmt: skip
        if name == "best" and self.options.checkpoint_dir:
            keep_best(self.folder, self.checkpoints.folder)

    def on_signal(self, number: int, frame: Any) -> None:
        if self.interrupted:  # a second one means it
            raise KeyboardInterrupt
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.interrupted = signal.Signals(number).name

    def announce(self, first: int) -> None:
        if jax.process_index():
            return
        splits = {"train": self.split, "validation": self.validation}
        write_record(
            self.folder, self.setup, splits, self.documents, first=first, steps=self.total, epoch_steps=self.epoch_steps
        )
        announce(self.setup, self.split, self.flops, steps=self.total, epoch_steps=self.epoch_steps, first=first)
        if first:
            say(f"resuming from step {first} of {self.total}")
        else:
            show_example(self.config, self.split, self.tokenizer)
