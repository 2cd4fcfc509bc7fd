"""`ftjax train`: the loop.

It never waits for the step in flight: the metrics of one update are read after the next is dispatched, and checkpoints
are written while training goes on.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from ftjax.compile_cache import keep_compiled_programs
from ftjax.config import Config
from ftjax.config.load import diff_configs, load_config, save_config
from ftjax.data.classes import with_labels
from ftjax.data.pipeline import BatchIterator, Split, load_splits
from ftjax.distributed import asked_to_stop, together
from ftjax.errors import UserError
from ftjax.flops import peak_of, train_flops
from ftjax.hub.output import write_output
from ftjax.hub.tokenizer import load_tokenizer
from ftjax.mesh import describe, notes, spec
from ftjax.methods import method_of
from ftjax.train.checkpoint import Checkpoints, place
from ftjax.train.profile import Profile
from ftjax.train.progress import Progress, say
from ftjax.train.record import peak_memory_gib, write_record
from ftjax.train.setup import Setup, compile_steps, prepare
from ftjax.train.step import StepMetrics, init_state
from ftjax.train.track import Observation, Tracker
from ftjax.train.watch import BestMetric, Diverged, LossWatch, OverfitWatch

# What may differ when a run goes on: it does not change which numbers come out, or only their rounding.
FREE_TO_CHANGE = (
    "mesh.", "training.logging_steps", "training.save_steps", "training.save_total_limit", "training.report_to",
    "training.profile_steps", "training.checkpoint_dir",
    "training.eval_batch_size", "model.remat", "model.attention", "objective.loss_chunk", "output_dir", "evaluate.", "check.",
)  # fmt: skip


# all parameters -> what was measured of them
Observer = Callable[[Mapping[str, jax.Array]], Observation]


def train(
    config: Config,
    *,
    config_path: Path | None = None,
    make_observer: Callable[[Setup, Any, Split | None], Observer | None] | None = None,
) -> None:
    """Fine-tune from start, or from the newest checkpoint in `output_dir`, to the end; writes the run folder.

    Args:
        make_observer: of set-up, tokenizer and validation data; what it gives is called at every evaluation.

    Raises UserError for whatever in the configuration, the model or the data is wrong.
    """
    keep_compiled_programs()
    with together():
        folder, config = Path(config.output_dir), with_labels(config)
        config = open_run_folder(folder, config)
        tokenizer = load_tokenizer(config.model)
        train_split, validation = load_splits(
            config.data, tokenizer, seed=config.training.seed, classes=config.objective.classes
        )
        setup = prepare(config)
        with jax.set_mesh(setup.mesh):
            observer = make_observer(setup, tokenizer, validation) if make_observer else None
            check_early_stopping(config, evaluates=validation is not None or observer is not None)
            Run(setup, tokenizer, train_split, validation, folder, config_path, observer).go()


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


def open_run_folder(folder: Path, config: Config) -> Config:
    """Create the run folder, or check that the run in it is this one.

    Raises UserError where the folder cannot be written, or holds checkpoints of another configuration.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            (folder / ".writable").write_bytes(b"")
            (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written: {error.strerror}; choose another output_dir") from None
    saved, checkpoints = folder / "config.yaml", checkpoints_of(config)
    elsewhere = checkpoints / "config.yaml" if config.training.checkpoint_dir else None
    if elsewhere and elsewhere.exists():  # this host may be a new one, whose disk is empty
        saved.write_text(elsewhere.read_text())
    if saved.exists() and any(checkpoints.glob("[0-9]*")):
        differences = [d for d in diff_configs(load_config(saved), config) if not d.startswith(FREE_TO_CHANGE)]
        if differences:
            raise UserError(
                f"output_dir: {config.training.checkpoint_dir or folder} holds checkpoints of another configuration, which "
                "differs in\n  "
                + "\n  ".join(differences)
                + "\nChoose another output_dir, remove that folder, or undo the difference to go on with that run"
            )
    if jax.process_index() == 0:
        save_config(config, saved)
        if elsewhere:
            elsewhere.parent.mkdir(parents=True, exist_ok=True)
            elsewhere.write_text(saved.read_text())
    return config


def checkpoints_of(config: Config) -> epath.Path:
    """Where a run keeps its checkpoints."""
    return place(config.training.checkpoint_dir or Path(config.output_dir) / "checkpoints")


class Run:
    """One run of the loop; what it prints and writes is the run folder of the documentation."""

    def __init__(
        self, setup: Setup, tokenizer: Any, split: Split, validation: Split | None, folder: Path, config_path: Path | None,
        observer: Observer | None = None,
    ):  # fmt: skip
        self.setup, self.tokenizer, self.split, self.validation, self.folder = setup, tokenizer, split, validation, folder
        self.config, self.config_path, self.observer = setup.config, config_path, observer
        options = self.options = setup.config.training
        self.epoch_steps = math.ceil(split.rows_per_epoch(0) / options.global_batch_size)
        self.total = options.max_steps or self.steps_of(options.num_train_epochs)
        self.train_step, self.eval_step, optimizer, self.schedule = compile_steps(setup, self.total)
        self.profile = Profile(options.profile_steps, folder / "profile", self.total)
        self.state = init_state(setup.params, optimizer)
        self.flops, self.peak = train_flops(setup.model), peak_of(list(setup.mesh.devices.flat))
        self.counted = np.zeros(2)  # FLOPs and tokens of this process's rows since the last log
        self.batches: BatchIterator = split.batches(
            options.global_batch_size, seed=options.seed, shuffle=True, epochs=None,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip
        self.watch = LossWatch(options.loss_spike_factor)
        self.best = BestMetric(
            options.metric_for_best_model,
            options.best_is_greatest,
            options.early_stopping_patience,
            options.early_stopping_threshold,
        )
        self.overfit = OverfitWatch()
        self.window = np.zeros(2)  # sums of loss * weight and of weight since the last log
        self.since_eval = np.zeros(2)  # and since the last evaluation
        self.latest: dict[str, float] = {}  # metrics of the last log
        self.last_eval = 0
        self.key = jax.random.key(options.seed)
        self.interrupted: str | None = None

    def steps_of(self, epochs: float) -> int:
        """Updates of so many epochs; epochs may pack into different numbers of rows."""
        whole = math.ceil(epochs)
        each = [math.ceil(self.split.rows_per_epoch(epoch) / self.options.global_batch_size) for epoch in range(whole)]
        return max(1, math.ceil(sum(each[:-1]) + each[-1] * (epochs - whole + 1)))

    # ---- start, middle, end ----

    def go(self) -> None:
        self.checkpoints = Checkpoints(checkpoints_of(self.config), self.options.save_total_limit)
        first = self.restore() if self.checkpoints.latest is not None else 0
        self.tracker = Tracker(
            self.folder, self.options.report_to, self.config.model_dump(mode="json"),
            active=jax.process_index() == 0, resume_from=first,
        )  # fmt: skip
        self.announce(first)
        # With several processes SIGTERM is JAX's, which has them all agree on the step after which they stop.
        numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
        handlers = {number: signal.signal(number, self.on_signal) for number in numbers}
        try:
            done = self.loop(first)
        except Diverged:
            # The update was refused inside the step, so the state is that of the last good one.
            self.save(int(self.state.step))
            self.checkpoints.wait()
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.profile.close()
            self.tracker.close()
        if self.interrupted:
            self.checkpoints.close()
            again = f"ftjax train {self.config_path}" if self.config_path else "the same command"
            say(f"{self.interrupted}: saved step {done} of {self.total} in {self.folder}. To go on: {again}")
            raise SystemExit(1)
        self.checkpoints.close()
        self.finish(done)

    def loop(self, first: int) -> int:
        """Updates `first + 1` to the last; returns the number of the last one done."""
        pending: tuple[int, StepMetrics] | None = None
        step = first
        with Progress(self.total, first) as progress:
            while step < self.total and not self.interrupted:
                rows = next(self.batches)
                self.counted += self.flops.of_batch(rows["positions"], rows["segment_ids"]), (rows["segment_ids"] > 0).sum()
                batch = self.place(rows, self.options.gradient_accumulation_steps)
                limit = np.float32(self.watch.limit())
                with self.profile.step(step + 1):
                    self.state, metrics = self.train_step(self.state, self.setup.frozen, batch, self.key, limit)
                step += 1
                self.profile.dispatched(step, metrics)
                if jax.process_count() > 1 and asked_to_stop(step):
                    self.interrupted = signal.SIGTERM.name
                if pending:
                    self.read(*pending, progress)
                pending = (step, metrics)
                evaluates = self.validation is not None or self.observer is not None
                evaluate = evaluates and self.options.eval_steps and step % self.options.eval_steps == 0
                save = step % self.options.save_steps == 0
                if evaluate or save or self.interrupted or step == self.total:
                    self.read(*pending, progress)  # a bad update must not be saved or called the best
                    pending = None
                if evaluate or (step == self.total and evaluates):
                    self.evaluate(step, progress)
                if save or self.interrupted or step == self.total:
                    self.save(step)
                if self.best.exhausted and step < self.total:
                    say(f"early stop at step {step}: {self.best.name} has not improved since step {self.best.step}")
                    self.save(step)
                    break
        return step

    def finish(self, step: int) -> None:
        """Write `final/` and say what to do next."""
        self.write("final", step, {})
        if jax.process_index() == 0:
            say(*next_commands(self.folder, self.config))

    # ---- one update, one evaluation ----

    def place(self, batch: Mapping[str, np.ndarray], microbatches: int | None) -> dict[str, jax.Array]:
        """This process's rows as part of a global array `[A, B, T]`, or `[B, T]` without microbatches."""

        def one(rows: np.ndarray) -> jax.Array:
            axes = ("batch", "length")
            if microbatches is not None:
                rows, axes = rows.reshape(microbatches, -1, *rows.shape[1:]), (None, *axes)
            return jax.make_array_from_process_local_data(NamedSharding(self.setup.mesh, spec(axes)), rows)

        return {name: one(rows) for name, rows in batch.items()}

    def read(self, step: int, metrics: StepMetrics, progress: Progress) -> None:
        """Fetch an update's metrics; log them where it is time."""
        if step <= progress.read:
            return
        loss, weight, tokens, grad_norm, update_norm, good = (np.asarray(value).item() for value in metrics)
        self.watch.see(step, loss, grad_norm, good)
        self.window += (loss * weight, weight)
        self.since_eval += (loss * weight, weight)
        progress.update(step, loss, tokens)
        if step % self.options.logging_steps == 0 or step == self.total:
            row = {
                "train/loss": self.window[0] / max(self.window[1], 1e-9),
                "train/learning_rate": float(self.schedule(step - 1)),
                "train/grad_norm": grad_norm,
                "train/update_norm": update_norm,
                "train/trained_tokens": weight,
                **self.speed(progress.rate()),
                "train/peak_memory_gib": peak_memory_gib(),
                "train/epoch": step / self.epoch_steps,
            }
            self.window[:] = self.counted[:] = 0
            self.latest = row
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
        if self.last_eval == step:
            return
        self.last_eval = step
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
        batches = self.validation.batches(
            rows, seed=0, shuffle=False, epochs=1, process_index=jax.process_index(), process_count=jax.process_count()
        )
        sums = np.zeros(3)
        for batch in batches:
            sums += np.array(self.eval_step(self.state.params, self.setup.frozen, self.place(batch, None)), np.float64)
        loss = sums[0] / max(sums[1], 1e-9)
        return {
            "eval/loss": loss,
            "eval/perplexity": math.exp(min(loss, 700.0)),
            "eval/token_accuracy": sums[2] / max(sums[1], 1e-9),
        }

    # ---- what is kept ----

    def save(self, step: int) -> None:
        if self.checkpoints.latest == step:
            return
        meta = {
            "step": step,
            "data": self.batches.get_state(),
            "best": self.best.state(),
            "recent_losses": list(self.watch.recent),
            "window": self.window.tolist(),
            "last_eval": self.last_eval,
            "since_eval": self.since_eval.tolist(),
            "latest": self.latest,
            "overfit": self.overfit.state(),
        }
        self.checkpoints.save(step, self.state, meta)

    def restore(self) -> int:
        self.state, meta = self.checkpoints.restore(self.state)
        self.batches.set_state(meta["data"])
        self.best.load(meta["best"])
        self.watch.recent.extend(meta["recent_losses"])
        self.window[:] = meta["window"]
        self.last_eval = meta["last_eval"]
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
        write_record(self.folder, self.setup, splits, first=first, steps=self.total, epoch_steps=self.epoch_steps)
        devices = jax.devices()
        say(
            f"devices: {len(devices)} {devices[0].platform} ({devices[0].device_kind}); mesh: {describe(self.setup.mesh)}",
            *([f"mesh: auto, because {self.setup.mesh_reason}"] if self.setup.mesh_reason else []),
            *(f"mesh: {note}" for note in notes(self.setup.mesh)),
            *([f"XLA_FLAGS: {os.environ.get('XLA_FLAGS', 'none')}"] if devices[0].platform == "gpu" else []),
            self.setup.trained_line(),
            self.flops.formula(self.config.data.max_length),
            *(f"note: {note}" for note in self.setup.model.notes),
            *self.split.report.lines(),
            f"{self.total} steps of {self.options.global_batch_size} rows, {self.epoch_steps} steps an epoch; "
            f"remat: {self.setup.runtime.remat}; attention: {self.setup.runtime.attention}",
        )
        if first:
            say(f"resuming from step {first} of {self.total}")
        else:
            self.show_example()

    def show_example(self) -> None:
        """One row as the model sees it, with what is trained marked."""
        from ftjax.data.preview import render_example

        if (classes := self.config.objective.classes) is not None:
            *text, number = self.split.example().tokens.tolist()
            say("an example:", self.tokenizer.decode(text), f"its class: {classes[number]}")
            return
        say("an example (what is trained is marked):", render_example(self.split.example(), self.tokenizer))


def next_commands(folder: Path, config: Config) -> list[str]:
    """What one does with a finished run."""
    final, base = folder / "final", config.model.path
    method = method_of(config.method)
    adapter = method.adapter
    if config.objective.classes is not None:
        lines = [f"done; the result is in {final}", f"  measure it: ftjax evaluate {folder} --data FILE"]
        if adapter:
            return [*lines, f"  one model:  ftjax export {folder} --out {folder / 'merged'} --merge"]
        return [*lines, f"  in Python:  transformers.pipeline('text-classification', {str(final)!r})"]
    model = f"{base} --adapter {final}" if adapter else str(final)
    raw = "--raw " if config.data.prompt_format == "raw" else ""  # as the prompts were that it learnt from
    merged = folder / "merged" if adapter else final
    lines = [
        f"done; the result is in {final}",
        f"  try it:     ftjax generate {model} {raw}--prompt '...'",
        f"  look at it: ftjax report {folder}",
    ]
    if adapter and method.merged is None:
        load = {
            "peft": "peft.PeftModel.from_pretrained(model, {})",
            "adapters": "adapters.init(model); model.load_adapter({}, use_safetensors=True)",
        }
        return [*lines, f"  in Python:  {load[method.library].format(repr(str(final)))} ({method.no_merge})"]
    if adapter:
        lines.append(f"  one model:  ftjax export {folder} --out {merged} --merge")
    return [
        *lines,
        f"  vLLM:       vllm serve {merged}",
        f"  llama.cpp:  python convert_hf_to_gguf.py {merged} --outfile model.gguf",
        f"  benchmarks: lm_eval --model hf --model_args pretrained={merged} --tasks hellaswag",
    ]
