"""`ftjax train`: open the run folder, load data and model, make the processes agree, and start the loop."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax

from ftjax.compile_cache import keep_compiled_programs
from ftjax.config import Config
from ftjax.data.pipeline import PackedSplit, load_splits
from ftjax.distributed import store
from ftjax.distributed.agree import agree
from ftjax.distributed.ending import fail_together
from ftjax.errors import UserError
from ftjax.hub.load import positions_of
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.hub.vocabulary import embeddings_of
from ftjax.mesh import devices_or_all
from ftjax.objectives import encoding_of, generates, objective_of
from ftjax.train.checkpoint import Checkpoints
from ftjax.train.folder import checkpoints_of, open_run_folder
from ftjax.train.layout import BatchLayout
from ftjax.train.lock import alone_in
from ftjax.train.loop import Run
from ftjax.train.observer import Observer
from ftjax.train.precompute import with_reference_values
from ftjax.train.same_run import facts_to_agree, fingerprints, refuse_other_documents
from ftjax.train.setup import Setup, prepare
from ftjax.train.source import BatchSource, DatasetBatches, steps_of_run
from ftjax.train.teach import with_predictions
from ftjax.train.teacher import refuse_other_vocabulary, with_partners
from ftjax.train.track import Heard, check_report_to


def train(
    config: Config,
    *,
    devices: Sequence[jax.Device] | None = None,
    command: str = "the same command",
    make_observer: Callable[[Setup, Any, PackedSplit | None], Observer | None] | None = None,
    make_source: Callable[[Setup, Any, PackedSplit], BatchSource] | None = None,
    heard: Heard | None = None,
    explain: Callable[[Exception, Config], Exception | None] | None = None,
) -> None:
    """Fine-tune from the start, or from the newest checkpoint in `output_dir`, to the end; writes the run folder.

    Args:
        devices: devices to use, such as `jax.devices()[:4]`; None uses all. With several processes, all give the same ones, and
            these are as many of each process.
        command: the command that resumes this run, for messages.
        make_observer: called with set-up, tokenizer and validation data; the observer is called at every evaluation.
        make_source: called with set-up, tokenizer and prompts, for an objective that generates answers (`ftjax.rl.learn`).
        heard: called with every row of metrics.jsonl after it is written, on the first process.
        explain: called with an error that ended the run, and its configuration; may return an error that says more.

    Raises UserError for anything wrong in the configuration, the model or the data; with several processes, all of them then
    end the same way (`ftjax.distributed.ending`).
    """
    with fail_together(), ExitStack() as held:
        keep_compiled_programs()
        devices = devices_or_all(devices)
        agree("the choice of devices", _facts(devices))
        config = objective_of(config).complete(config)
        held.enter_context(_explained(explain, config))
        generated = generates(config)
        if generated and make_source is None:
            raise UserError(
                f"objective {config.objective.name} generates answers: pass make_source (ftjax.rl.learn) to train()"
            )
        check_report_to(config.training.report_to)
        held.enter_context(alone_in(config))
        open_run_folder(config)
        checkpoints = Checkpoints(checkpoints_of(config), config.training.save_total_limit)
        tokenizer = load_tokenizer(config.model)
        refuse_other_vocabulary(config, tokenizer)
        train_split, validation = load_splits(
            config.data, tokenizer, seed=config.training.seed, encoding=encoding_of(config),
            positions=positions_of(config.model.path, config.model.revision),
        )  # fmt: skip
        train_split, validation = with_predictions(config, (train_split, validation))
        train_split, validation = with_partners(config, (train_split, validation), tokenizer)
        embeddings = embeddings_of(config)
        for split in (train_split, validation):
            if split is not None:
                split.refuse_unknown(embeddings, tokenizer)
        documents = fingerprints(train_split, validation)
        refuse_other_documents(checkpoints, documents, config)
        steps = None if generated else steps_of_run(train_split, config.training)
        if store.several():
            agree("this run", facts_to_agree(config, documents, steps, checkpoints.latest))
        setup = prepare(config, devices)
        with jax.set_mesh(setup.mesh):
            observer = make_observer(setup, tokenizer, validation) if make_observer else None
            agree("what is evaluated while training", observer.facts if observer is not None else {})
            check_early_stopping(config, evaluates=validation is not None or observer is not None)
            if generated:
                source = make_source(setup, tokenizer, train_split)
                # Of prompts there is no loss: the observer answers them.
                validation = validation if encoding_of(config).imitated else None
            else:
                train_split, validation = (with_reference_values(setup, split) for split in (train_split, validation))
                options = config.training
                layout = BatchLayout(setup.mesh, options.global_batch_size, options.gradient_accumulation_steps)
                source = DatasetBatches(train_split, options, layout, steps)
            Run(setup, tokenizer, source, validation, checkpoints, documents, command, observer, heard).go()


@contextmanager
def _explained(explain: Callable[[Exception, Config], Exception | None] | None, config: Config) -> Iterator[None]:
    """Raise the error that `explain` returns in place of another; on all processes, it is the one that is reported."""
    try:
        yield
    except Exception as error:
        if explain is not None and (told := explain(error, config)) is not None:
            raise told from error
        raise


def _facts(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Return what must be equal on all processes: how many of the devices each has, their platform, and which they are."""
    own = sum(device.process_index == jax.process_index() for device in devices)
    return {"devices": own, "platform": devices[0].platform, "ids of all devices": [device.id for device in devices]}


def check_early_stopping(config: Config, *, evaluates: bool) -> None:
    """Raise UserError if early stopping is set and there is no evaluation to stop at."""
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
