"""Tests the command line: exit codes, messages without a traceback, doctor."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import verbs

import ftjax
from ftjax import cli, doctor
from ftjax.errors import UserError
from ftjax.generate.named import LoadOptions
from ftjax.generate.request import Request


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `ftjax ARGUMENTS`."""
    code = verbs.ftjax(*arguments)
    return code, *capsys.readouterr()


def test_help_lists_the_verbs_and_imports_nothing_heavy():
    code = "import sys; from ftjax.cli import main\ntry: main()\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert all(verb in done.stdout for verb in ("train", "preview", "generate", "chat", "export", "doctor", "models"))
    assert not {"jax", "flax", "transformers", "pydantic", "datasets", "numpy"} & set(done.stderr.split())


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "ftjax", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ftjax {ftjax.__version__}\n"


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"ftjax {ftjax.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [(), ("train",), ("export",), ("tran",), ("train", "a.yaml", "--nonsense"), ("doctor", "extra")]
)
def test_wrong_usage_exits_with_2(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and "Usage: ftjax" in out + err


@pytest.mark.parametrize(
    "words, expected",
    [
        ("ftjax ru", ["runs"]),
        ("ftjax train run.yaml training.max", ["training.max_steps=", "training.max_skipped_updates="]),
        ("ftjax config --example q", ["qlora"]),
        ("ftjax config lo", ["lora"]),
        ("ftjax export --gg", ["--gguf"]),
    ],
)
def test_the_shell_completes(capsys, monkeypatch, words, expected):
    """As the script of `ftjax --show-completion` asks for it."""
    monkeypatch.setenv("_FTJAX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert run(capsys) == (0, "".join(f"{one}\n" for one in expected), "")


def test_a_users_mistake_exits_with_2_and_says_everything(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  path: a[b]\ndata: {train: x.jsonl}\noptimizer: {learning_rat: 1}\n")
    code, out, err = run(capsys, "train", str(path), "method.rr=2")
    assert code == 2 and out == "" and "Traceback" not in err
    assert err.startswith(f"error: {path}: 2 errors\n  {path}:4:13: optimizer.learning_rat: unknown key")
    assert "override 'method.rr=2': method.rr: unknown key; did you mean r?" in err


@pytest.mark.parametrize(
    "raised, code, said",
    [(UserError("[bold]no[/] such model"), 2, "error: [bold]no[/] such model\n"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_what_a_verb_raises_becomes_an_exit_code(monkeypatch, capsys, raised, code, said):
    def fail():
        raise raised

    monkeypatch.setattr(doctor, "examine", fail)
    got, _, err = run(capsys, "doctor")
    assert got == code and said in err and "Traceback" not in err


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail():
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(doctor, "examine", fail)
    with pytest.raises(ZeroDivisionError):
        cli.app(["doctor"])


def test_models_lists_the_registry(capsys):
    from ftjax.models.registry import FAMILIES

    code, out, _ = run(capsys, "models")
    assert code == 0 and all(name in out for name in FAMILIES)


@pytest.fixture
def run_file(tmp_path, untrained):
    """A configuration of a small model and three rows of data."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {n}:", "completion": f" number {n}"}) + "\n" for n in range(3)))
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: {untrained}}}\ndata: {{train: {data}, max_length: 64}}\noutput_dir: {tmp_path / 'run'}\n")
    return path


def test_preview(capsys, run_file):
    code, out, _ = run(capsys, "preview", str(run_file), "--examples", "1")
    assert code == 0 and "say 0:" in out and "number 0" in out and "say 1:" not in out
    code, out, _ = run(capsys, "preview", str(run_file), "--json")
    assert code == 0 and json.loads(out)


def test_keys_as_flags(capsys, run_file):
    """As other tools' command lines have them, beside the verb's own, of which `_` is as good as `-`."""
    given = "preview --max_length 32 CONFIG --seed=3 --examples 1 --packing --json".replace("CONFIG", str(run_file)).split()
    code, out, err = run(capsys, *given)
    assert code == 0 and json.loads(out)["train"]["max_length"] == 32 and "max_length is read as data.max_length" in err
    code, _, err = run(capsys, "train", str(run_file), "--learning_rat", "3")
    assert code == 2 and "did you mean optimizer.learning_rate?" in err
    code, _, err = run(capsys, "evaluate", str(run_file), "--compare_base", "--nonsense")
    assert code == 2 and "No such option: --nonsense" in err


@pytest.mark.parametrize("given, said", [("nowhere", "no such folder"), (".", "expected a run folder")])
def test_export_of_what_is_no_run(capsys, tmp_path, given, said):
    code, _, err = run(capsys, "export", str(tmp_path / given), "--out", str(tmp_path / "out"))
    assert code == 2 and said in err and not (tmp_path / "out").exists()


OPTIONS = {
    "adapter": "a", "revision": "b", "tokenizer": "c", "chat_template": "d", "system": "e", "max_new_tokens": 7,
    "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": 0.3,
    "frequency_penalty": -0.2, "stop": ["x", "y"], "seed": 5,
    "dtype": "float32", "quantization": "nf4", "special_tokens_in_text": "encode",
}  # fmt: skip
GENERATE_ONLY = {"prompt": ["p", "-"], "prompts": "f.txt", "raw": True, "batch_size": 4, "as_json": True}


@pytest.mark.parametrize("verb, options", [("generate", OPTIONS | GENERATE_ONLY), ("chat", OPTIONS)])
def test_options_of_generation_arrive(monkeypatch, capsys, verb, options):
    """Every option reaches the command's function, and every setting has an option."""
    module = importlib.import_module("ftjax.generate.command" if verb == "generate" else "ftjax.generate.chat")
    signature = inspect.signature(getattr(module, verb))
    called = {}
    monkeypatch.setattr(module, verb, lambda *args, **kwargs: called.update(signature.bind(*args, **kwargs).arguments))
    arguments = []
    for name, value in options.items():
        flag = "--json" if name == "as_json" else f"--{name.replace('_', '-')}"
        arguments += (
            [flag]
            if value is True
            else [x for one in (value if isinstance(value, list) else [value]) for x in (flag, str(one))]
        )
    assert run(capsys, verb, "some/model", *arguments)[0] == 0
    arrived = flat(called)
    assert {key: str(value) if isinstance(value, Path) else value for key, value in arrived.items()} == {
        "model": "some/model", **{name: tuple(value) if name == "stop" else value for name, value in options.items()}
    }  # fmt: skip
    # options that are not given have the records' defaults
    called.clear()
    run(capsys, verb, "some/model")
    longest = Request(max_new_tokens=512) if verb == "chat" else Request()
    assert called["request"] == longest and called["options"] == LoadOptions()
    rest = {name: value for name, value in called.items() if name not in ("model", "request", "options", "sampling")}
    assert rest == {n: signature.parameters[n].default for n in rest}
    assert verb == "generate" or set(called["sampling"].values()) == {None}


def flat(called: dict) -> dict:
    """Return the received values by option name, without those decided later (`number`, `chat`, `tools`, the prompt)."""
    given = dict(called)
    request, options = given.pop("request"), given.pop("options")
    sampling = given.pop("sampling", None) or vars(request.sampling)
    own = {name: getattr(request, name) for name in ("max_new_tokens", "stop", "seed")}
    return {**given, **vars(options), **sampling, **own}


def test_generate_without_a_prompt(capsys):
    code, _, err = run(capsys, "generate", "some/model")
    assert code == 2 and "no prompt" in err


def test_generate_answers(capsys, stories):
    code, out, _ = run(capsys, "generate", str(stories), "--prompt", "Once upon a time", "--max-new-tokens", "8")
    assert code == 0 and out.startswith(", there was")


# doctor


def test_doctor_as_json(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_a_test")
    code, out, err = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["missing"] == [] and report["hub_token"] is True
    assert "hf_secret_of_a_test" not in out + err
    packages = {package["name"]: package for package in report["packages"]}
    assert packages["jax"]["state"].startswith("ok") and packages["torch"]["extra"] == "test"
    assert len(report["devices"]) == 8 and report["devices"][0]["platform"] == "cpu"
    assert {folder["what"] for folder in report["folders"]} >= {"Hub cache", "working"}


def test_doctor_for_people(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "devices: 8 x cpu" in out and "nothing required is missing" in out


def test_doctor_exits_with_1_when_something_required_is_missing(monkeypatch, capsys):
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"optax": None, "flax": "0.1.0"}.get(name, installed(name)))
    code, out, _ = run(capsys, "doctor")
    assert code == 1 and "missing: flax>=" in out and "missing: optax>=" in out and "found 0.1.0" in out


def test_doctor_without_torch_is_content(monkeypatch, capsys):
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "torch" else installed(name))
    assert run(capsys, "doctor")[0] == 0


@pytest.mark.parametrize("extra, found", [("cuda", "_has_nvidia"), ("tpu", "_has_tpu")])
def test_doctor_names_the_extra_that_a_device_needs(monkeypatch, extra, found):
    monkeypatch.setattr(doctor, found, lambda: True)
    assert any(f"ftjax[{extra}]" in hint for hint in doctor.examine().hints)


def test_constraints_pin_what_is_required(tmp_path):
    pins = doctor._pins(doctor.CONSTRAINTS)
    for package in doctor.examine().packages:
        if package.extra is None:
            assert doctor._normal(package.name) in pins, f"constraints.txt does not pin {package.name}"
    path = tmp_path / "constraints.txt"
    path.write_text("# words\na.B==1\nc==2 ; python_version < '3'\nd>=3\n\n")
    assert doctor._pins(path) == {"a-b": "1"}
