"""Tests configuration files: values, positions of errors, aliases, overrides, round trips."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftjax.config import Config, DataConfig, FullConfig, ModelConfig
from ftjax.config.alias import ALIASES, EXPLAINED
from ftjax.config.flags import as_overrides
from ftjax.config.interpolate import escape, interpolate
from ftjax.config.load import diff_configs, flatten_config, load_config, save_config
from ftjax.config.schema import homes, models_at, section_fields
from ftjax.config.yaml_text import Reader, dump
from ftjax.errors import UserError

MINIMAL = "model: {path: gpt2}\ndata: {train: a.jsonl}\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def load(write):
    """Return a function that loads MINIMAL + text with overrides; notes are collected in `load.notes`."""

    def load(text: str = "", *overrides: str) -> Config:
        load.notes = []
        return load_config(write(MINIMAL + text), overrides, note=load.notes.append)

    return load


def refusal(load, text: str = "", *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value)


# Values


def test_minimal_file_takes_the_defaults(load):
    config = load()
    assert config == Config(model=ModelConfig(path="gpt2"), data=DataConfig(train="a.jsonl"))
    assert load.notes == []


def test_json_is_yaml(write):
    path = write('{"model": {"path": "gpt2"}, "data": {"train": "a.jsonl"}, "optimizer": {"learning_rate": 1e-3}}', "run.json")
    assert load_config(path).optimizer.learning_rate == 1e-3


def test_json_as_other_tools_write_it(write):
    """Indented with tabs, and with every character beyond ASCII escaped."""
    tree = {"model": {"path": "gpt2"}, "data": {"train": "a.jsonl", "template": "\t😀 {question}"}}
    for name, text in (("tabs.json", json.dumps(tree, indent="\t")), ("one.json", json.dumps(tree).replace(": ", ":\t"))):
        assert load_config(write(text, name)).data.template == "\t😀 {question}"
    path = write(json.dumps({**tree, "output_dir": "\ud83d"}), "half.json")
    with pytest.raises(UserError, match=r"half.json:1:\d+: .*lone surrogate"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("{a: " * 2000 + "1" + "}" * 2000, "nested too deeply"),
        (
            "a0: &a0 [x, x, x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(12)),
            "more than",
        ),
    ],
)
def test_texts_that_would_never_end(write, text, said):
    with pytest.raises(UserError, match=said):
        load_config(write(MINIMAL + text if text.startswith("a") else text))


@pytest.mark.parametrize(
    "text, value", [("1e-3", 1e-3), ("1E-3", 1e-3), ("5.e-4", 5e-4), (".5", 0.5), ("+2e0", 2.0), ("1_0", 10.0)]
)
def test_numbers_that_yaml_1_1_reads_as_strings(load, text, value):
    assert load(f"optimizer: {{learning_rate: {text}}}\n").optimizer.learning_rate == value
    assert load("", f"optimizer.learning_rate={text}").optimizer.learning_rate == value


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "12:30", "2020-01-01", "010"])
def test_words_that_yaml_1_1_reads_as_something_else(load, word):
    assert load(f"output_dir: {word}\n").output_dir == word
    assert load("", f"output_dir={word}").output_dir == word


def test_a_section_with_nothing_under_it_is_its_defaults(load):
    assert load("training:\n") == load()


def test_a_method_without_a_name_is_the_default_method(load):
    assert load("method: {r: 4}\n").method == load("method: {name: lora, r: 4}\n").method
    assert load("", "method.r=4").method.r == 4


def test_anchors_and_merge_keys(load):
    config = load(
        "training: &t {seed: 1, save_steps: 5}\noptimizer: {groups: [&g {pattern: a, freeze: true}, {<<: *g, pattern: b}]}\n"
    )
    assert [(g.pattern, g.freeze) for g in config.optimizer.groups] == [("a", True), ("b", True)]


def test_report_to_takes_one_name_and_none(load):
    assert load("training: {report_to: wandb}\n").training.report_to == ["wandb"]
    assert load("training: {report_to: none}\n").training.report_to == []


# Errors


def test_every_error_is_reported_at_once_with_its_place(load, tmp_path):
    text = "optimizer:\n  learning_rat: 1\n  learning_rate: fast\nmethod: {name: lora, rr: 2}\n"
    lines = refusal(load, text, "training.seed=x", "data.packin=true").splitlines()
    path = tmp_path / "run.yaml"
    assert lines == [
        f"{path}: 5 errors",
        f"  {path}:4:3: optimizer.learning_rat: unknown key; did you mean learning_rate?",
        f"  {path}:5:3: optimizer.learning_rate: expected a number, found 'fast'",
        f"  {path}:6:22: method.rr: unknown key; did you mean r?",
        "  override 'training.seed=x': training.seed: expected a whole number, found 'x'",
        "  override 'data.packin=true': data.packin: unknown key; did you mean packing?",
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "max_new_tokens: 1\n",
            "3:1: max_new_tokens: unknown key; it belongs at evaluate.max_new_tokens or check.",
        ),
        ("evaluate: {learning_rate: 1}\n", "it belongs at optimizer.learning_rate"),
        ("template: llama3\n", "template: unknown key; it belongs at data.template"),
        ("training: {learning-rat: 1}\n", "did you mean optimizer.learning_rate"),
        ("trainin: {seed: 1}\n", "trainin: unknown key; did you mean training?"),
        ("zzz: 1\n", "zzz: unknown key; known keys here: model, method, data"),
        ("method: {name: full, r: 4}\n", "method.r: unknown key; it is a key of method lora, and method.name is full"),
        ("method: {name: lroa}\n", "method: unknown name 'lroa'; did you mean lora? known: "),
        ("method: lora\n", "method: expected a mapping (`key: value` lines), found 'lora'; write method: {name: lora}"),
        ("method: {target_modules: 3}\n", "method.target_modules: expected a string or a list, found 3"),
        ("method: {r: true}\n", "method.r: expected a whole number, found 'true'"),
        ("method: {r: 1.5}\n", "method.r: expected a whole number, found 1.5"),
        ("method: {r: 0}\n", "method.r: must be at least 1; found 0"),
        ("method: {rank_pattern: {q: x}}\n", "method.rank_pattern.q: expected a whole number, found 'x'"),
        ("optimizer: {adam_beta1: .nan}\n", "optimizer.adam_beta1: expected a finite number"),
        ("optimizer: {lr_scheduler_type: cosin}\n", "did you mean cosine? known: cosine, linear"),
        ("optimizer: {groups: [{patern: a}]}\n", "optimizer.groups.0.patern: unknown key; did you mean pattern?"),
        ("optimizer: {groups: [{}]}\n", "optimizer.groups.0.pattern: missing"),
        ("training: {global_batch_size: 6, gradient_accumulation_steps: 4}\n", "global_batch_size 6 is not a multiple of"),
        ("mesh: {data: -1}\n", "only one axis may be -1; found data, fsdp"),
        ("mesh: {tensor: 0}\n", "an axis has at least one device"),
        ("output_dir: 5\n", "output_dir: expected a string, found 5 (put it in quotes)"),
        ("output_dir: a\noutput_dir: b\n", "4:1: output_dir is given twice; the first is on line 3"),
        ("training:\n\tseed: 1\n", "indent with spaces, not tabs"),
        ("training: [1\n", "not valid YAML"),
        ("output_dir: !!python/name:os.system x\n", "the tag tag:yaml.org,2002:python/name:os.system is not supported"),
        ("optimizer: {groups: &a [*a]}\n", "this anchor contains itself"),
        ("? [a]\n: 1\n", "a key must be a word"),
        ("quantization_config: {}\n", "write model.quantization"),
        ("bf16: false\n", "bf16: expected true, found false; write model.compute_dtype itself"),
        ("load_in_4bit: 3\n", "load_in_4bit: expected true or false, found 3; write model.quantization itself"),
        ("load_in_4bit: true\nload_in_8bit: true\n", "load_in_8bit means model.quantization, which is given too"),
        ("quantization_bit: 2\n", "quantization_bit: only 4 and 8 bits can be converted"),
        ("optimizer: {name: adamw_9bit}\n", "found 'adamw_9bit'; did you mean adamw?"),
        ("method: {init_lora_weights: pissa_niter_x}\n", "method.init_lora_weights: "),
        ("method: {name: ia3, bias: all}\n", "method.bias: unknown key; it is a key of method lora, and method.name is ia3"),
        ("output_dir: ${training.seedd}\n", "Interpolation key 'training.seedd' not found"),
        ("output_dir: ${output_dir}\n", "output_dir: '${output_dir}' cannot be resolved"),
        ("output_dir: a${\n", "is not a reference"),
    ],
)
def test_what_is_said(load, text, said):
    assert said in refusal(load, text)


@pytest.mark.parametrize(
    "override, said",
    [
        ("training.seed", "write overrides as key=value"),
        ("=3", "write overrides as key=value"),
        ("training..seed=3", "write overrides as key=value"),
        ("training.seed=", "the value is empty; write training.seed=null"),
        ("trainin.seed=3", "override 'trainin.seed=3': trainin: unknown key; did you mean training?"),
        ("model.path.x=3", "model.path is a single value and has no key x"),
        ("optimizer.groups.0.freeze=true", "optimizer.groups.0"),
        ("method.target_modules=[q", "not valid YAML"),
        ("data.revision=x", "it belongs at model.revision"),  # the source's key is meant
    ],
)
def test_wrong_overrides(load, override, said):
    assert said in refusal(load, "", override)


def test_options_that_do_not_fit_together_are_named_together(load):
    options = "init_lora_weights: pissa, use_dora: true, layers_to_transform: [1], target_modules: .*q_proj"
    said = refusal(load, f"method: {{{options}}}\n", "model.quantization=nf4")
    for part in (
        "3 things",
        "layers_to_transform needs target_modules as a list",
        "method.use_dora: true",
        "model.quantization: nf4",
    ):
        assert part in said


def test_a_union_complains_once_and_about_the_branch_that_was_meant(load):
    (line,) = refusal(load, "method: {target_modules: [q, 3]}\n").splitlines()
    assert line.endswith("run.yaml:3:30: method.target_modules.1: expected a string, found 3 (put it in quotes)")


def test_missing_required_keys_are_named(write):
    with pytest.raises(UserError) as caught:
        load_config(write("training: {seed: 1}\n"))
    assert "model.path: missing" in str(caught.value) and "data.train: missing" in str(caught.value)


@pytest.mark.parametrize(
    "text, said",
    [("", "the file is empty"), ("# only words\n", "the file is empty"), ("- a\n", "found a list"), ("a\n", "single value")],
)
def test_files_without_sections(write, text, said):
    with pytest.raises(UserError, match=said):
        load_config(write(text))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "config.yaml").write_text(MINIMAL)
    with pytest.raises(UserError, match=r"absent\.yaml: there is no such configuration file; .* holds config\.yaml"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match=r"this is a folder, not a configuration file; did you mean .*config\.yaml"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: {path: x}\noutput_dir: caf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.yaml:2: not UTF-8"):
        load_config(tmp_path / "latin.yaml")


# Aliases


@pytest.mark.parametrize(
    "name, advice",
    [
        ("train_on_eos", "the end of each trained turn is trained"),
        ("eval_split", r"data.validation: \{path: HUB_ID, split: NAME\}"),
        ("num_workers", "data.num_proc"),
        ("split_special_tokens", "data.special_tokens_in_text: split, encode or error"),
    ],
)
@pytest.mark.parametrize("section", ["", "data"])
def test_a_data_key_of_another_tool_is_refused_with_advice(write, name, advice, section):
    text = f"model: {{path: gpt2}}\ndata: {{train: a.jsonl{f', {name}: turn' if section else ''}}}\n"
    with pytest.raises(UserError, match=rf"{name}.*{advice}"):
        load_config(write(text + ("" if section else f"{name}: turn\n")))


def test_every_alias_stands_for_a_key_and_hides_none():
    for name, alias in ALIASES.items():
        section, key = alias.target.split(".")
        models = models_at((section,), {})
        assert any(key in model.model_fields for model in models), f"{name} stands for {alias.target}, which is no key"
        assert not any(name in model.model_fields for model in models), f"{name} is a key of {section}"
        assert name not in Config.model_fields
    assert not set(EXPLAINED) & set(ALIASES)
    assert set(EXPLAINED) & set(homes()) == {"fsdp", "batch_size"}  # a key of mesh: and of evaluate:, and another tool's name


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("method: {lora_rank: 4}\n", "method.r", 4),
        ("lora_r: 4\n", "method.r", 4),
        ("data_: 0\n", None, None),
        ("sequence_len: 64\n", "data.max_length", 64),
        ("split_special_tokens: true\n", "data.special_tokens_in_text", "split"),
        ("split_special_tokens: false\n", "data.special_tokens_in_text", "encode"),
        ("validation_split_percentage: 5\n", "data.validation_split", 0.05),
        ("val_split_fraction: 0.1\n", "data.validation_split", 0.1),
        ("validation_file: v.jsonl\n", "data.validation", "v.jsonl"),
        ("eval_dataset: v.jsonl\n", "data.validation", "v.jsonl"),
        ("dataset_num_proc: 2\n", "data.num_proc", 2),
        ("preprocessing_num_workers: 2\n", "data.num_proc", 2),
        ("cutoff_len: 64\n", "data.max_length", 64),
        ("num_epochs: 3\n", "training.num_train_epochs", 3.0),
        ("optimizer: {lr: 1e-3}\n", "optimizer.learning_rate", 1e-3),
        ("training: {lr: 1e-3}\n", "optimizer.learning_rate", 1e-3),
        ("optimizer: {optim: adamw_torch}\n", "optimizer.name", "adamw"),
        ("gradient_checkpointing: true\n", "model.remat", "full"),
        ("lora_target: all\n", "method.target_modules", "all-linear"),
        ("lora_target: q_proj, v_proj\n", "method.target_modules", ["q_proj", "v_proj"]),
        ("finetuning_type: full\n", "method.name", "full"),
        ("adapter: lora\n", "method.name", "lora"),
        ("adapter:\n", "method.name", "full"),
        ("load_in_4bit: true\n", "model.quantization", "nf4"),
        ("method: {load_in_8bit: true}\n", "model.quantization", "int8"),
        ("load_in_8bit: false\n", "model.quantization", None),
        ("quantization_bit: 4\n", "model.quantization", "nf4"),
        ("training: {fp16: true}\n", "model.compute_dtype", "float16"),
        # ftjax's own keys in the sections where other tools have them
        ("learning_rate: 1e-3\n", "optimizer.learning_rate", 1e-3),
        ("training: {learning_rate: 1e-3}\n", "optimizer.learning_rate", 1e-3),
        ("training: {Learning-Rate: 1e-3}\n", "optimizer.learning_rate", 1e-3),
        ("training: {output_dir: runs/x}\n", "output_dir", "runs/x"),
        ("method: {quantization: int8}\n", "model.quantization", "int8"),
        ("seed: 3\n", "training.seed", 3),
        ("r: 4\n", "method.r", 4),
        # and values
        ("method: {name: qlora}\n", "model.quantization", "nf4"),
        ("method: {name: QLoRA}\n", "method.name", "lora"),
        ("method: {name: dora}\n", "method.use_dora", True),
        ("optimizer: {name: adamw_8bit}\n", "optimizer.state_dtype", "int8"),
        ("optimizer: {name: paged_adamw_32bit}\n", "optimizer.name", "adamw"),
        ("optimizer: {name: AdamW}\n", "optimizer.name", "adamw"),
        ("optimizer: {lr_scheduler_type: wsd}\n", "optimizer.lr_scheduler_type", "warmup_stable_decay"),
        ("optimizer: {param_dtype: torch.bfloat16}\n", "optimizer.param_dtype", "bfloat16"),
        ("rl: dpo\n", "objective.name", "dpo"),
        ("rl: KTO\n", "objective.name", "kto"),
        ("stage: rm\n", "objective.name", "reward"),
        ("stage: sft\n", "objective.name", "sft"),
        ("reward_model: true\n", "objective.name", "reward"),
        ("objective: {name: SimPO}\n", "objective.name", "simpo"),
        ("objective: {name: ipo}\n", "objective.loss_type", ["ipo"]),
        ("objective: {name: dpo, pref_beta: 0.2}\n", "objective.beta", 0.2),
        ("objective: {name: orpo, orpo_alpha: 0.2}\n", "objective.beta", 0.2),
        ("objective: {name: dpo, pref_loss: hinge}\n", "objective.loss_type", ["hinge"]),
        ("objective: {name: dpo, dpo_loss_type: [sigmoid, sft]}\n", "objective.loss_type", ["sigmoid", "sft"]),
        ("objective: {name: kto, kto_rejected_weight: 1.5}\n", "objective.undesirable_weight", 1.5),
        ("objective: {name: kto, kto_desirable_weight: 1.5}\n", "objective.desirable_weight", 1.5),
    ],
)
def test_aliases(load, text, key, value):
    if key is None:
        assert "unknown key" in refusal(load, text)
        return
    assert flatten_config(load(text))[key] == value
    (note,) = load.notes
    assert key in note and "run.yaml:3:" in note


def test_an_objective_of_another_tool_with_its_settings(load):
    """As axolotl and LLaMA-Factory write them."""
    config = load("rl: ipo\nrl_beta: 0.3\n")
    assert (config.objective.name, config.objective.loss_type, config.objective.beta) == ("dpo", ["ipo"], 0.3)
    config = load("stage: dpo\npref_beta: 0.2\npref_loss: sigmoid\nmethod: {finetuning_type: lora}\n")
    assert (config.objective.name, config.objective.loss_type, config.objective.beta) == ("dpo", ["sigmoid"], 0.2)
    config = load("objective: {name: dpo}\nbeta: 0.3\nloss_type: hinge\n")  # TRL's names are the keys themselves
    assert (config.objective.loss_type, config.objective.beta) == (["hinge"], 0.3)


@pytest.mark.parametrize(
    "text, said",
    [
        ("stage: ppo\n", "only sft, dpo, kto and rm can be converted"),
        ("stage: dpo\npref_loss: orpo\n", "orpo is an objective of its own; write objective.name: orpo"),
        ("stage: dpo\npref_loss: kto_pair\n", "kto_pair is an objective of its own; write objective.name: kto"),
        (
            "objective: {name: dpo, loss_type: [sigmoid, SimPO]}\n",
            "SimPO is an objective of its own; write objective.name: simpo",
        ),
        ("stage: dpo\npref_ftx: 0.1\n", "objective.loss_type: [sigmoid, sft] and objective.loss_weights: [1, FACTOR]"),
        ("objective: {name: dpo, rpo_alpha: 1}\n", "objective.loss_type: [sigmoid, sft]"),
        ("rl: dpo\nmax_prompt_length: 512\n", "holds the chosen and the rejected conversation; data.truncation says"),
        ("rl: dpo\nref_model: gpt2\n", "the reference is the model before training"),
        ("rl: dpo\nuse_liger_kernel: true\n", "objective.loss_chunk"),
        ("rl: simpo\ngamma_beta_ratio: 0.5\n", "write objective.simpo_gamma: this ratio times objective.beta"),
        ("rl: dpo\ndpo_label_smoothing: 0.1\n", "the losses robust, exo_pair, aot and aot_unpaired use"),
        (
            "objective: {name: dpo, label_smoothing: 0.1}\n",
            "label_smoothing 0.1 changes nothing in loss_type sigmoid; robust, ",
        ),
        ("objective: {name: cpo, loss_type: ipo, label_smoothing: 0.1}\n", "changes nothing in loss_type ipo"),
        ("objective: {name: dpo, discopop_tau: 0.1}\n", "discopop_tau 0.1 changes nothing without discopop in loss_type"),
        ("objective: {name: dpo, f_alpha_divergence_coef: 1}\n", "changes nothing without f_divergence_type: alpha_divergence"),
        ("objective: {name: dpo, ref_model_sync_steps: 64}\n", "changes nothing without sync_ref_model: true"),
        ("objective: {name: cpo, simpo_gamma: 1}\n", "changes nothing without loss_type: simpo or alphapo"),
        (
            "objective: {loss_type: ipo}\n",
            "a key of objective dpo, cpo, kto, grpo, and objective.name is sft; set objective.name to one",
        ),
        ("rl: ppo\n", "objective"),
        ("rl: grpo\nreward_weights: [1]\n", "objective.rewards: [{name: NAME, weight: FACTOR}]"),
        ("rl: grpo\ngroup_size: 3\n", "8 is not a multiple of objective.num_generations 3"),
        ("rl: grpo\nmax_length: 256\n", "data.max_length 256 must hold prompt and answer"),
    ],
)
def test_a_preference_key_of_another_tool_is_refused_with_advice(load, text, said):
    assert said in refusal(load, text)


def test_what_a_value_means_and_what_is_given_must_agree(load):
    assert load("method: {name: qlora}\n", "model.quantization=nf4").model.quantization == "nf4"
    said = refusal(load, "method: {name: qlora}\n", "model.quantization=int8")
    assert "run.yaml:3:10: method.name: qlora means model.quantization: nf4, and int8 is given; write method.name: lora" in said
    config = load("optim: adamw_8bit\n", "method.name=qlora")
    assert (config.optimizer.name, config.optimizer.state_dtype, config.model.quantization) == ("adamw", "int8", "nf4")


def test_switches(load):
    """A switch that is off prints nothing if its target is off anyway; one that is on may be turned off."""
    config = load("bf16: false\nload_in_8bit: false\nload_in_4bit: true\nfp16: true\n")
    assert (config.model.quantization, config.model.compute_dtype) == ("nf4", "float16")
    assert sum("changes nothing" in note for note in load.notes) == 2
    assert load("load_in_4bit: true\n", "load_in_4bit=false").model.quantization is None
    assert load("load_in_4bit: true\n", "load_in_8bit=false").model.quantization == "nf4"
    assert load("reward_model: false\n").objective.name == "sft"


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("optimizer: {learning_rate: 2}\n", "optimizer.learning_rate is 2"),
        ("learning_rate: 0.2\n", "optimizer.learning_rate is 0.2"),
        ("optimizer: {groups: [{pattern: a, learning_rate: 20}]}\n", "optimizer.groups.0.learning_rate is 20"),
        ("optimizer: {weight_decay: 3}\n", "optimizer.weight_decay is 3"),
        ("optimizer: {learning_rate: 0.3}\nmethod: {name: prompt_tuning, num_virtual_tokens: 4}\n", None),
        ("optimizer: {learning_rate: 1e-2}\n", None),
    ],
)
def test_unusual_values_are_warned_of(load, text, warned):
    load(text)
    warnings = [note for note in load.notes if note.startswith("warning: ")]
    assert (warned is None and not warnings) or (len(warnings) == 1 and warned in warnings[0])


# Flags


OWN = ("--examples", "--html", "--help", "-h")


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["run.yaml", "--learning_rate", "2e-4"], ["run.yaml", "learning_rate=2e-4"]),
        (["--learning-rate=2e-4", "run.yaml", "a=b"], ["run.yaml", "a=b", "learning_rate=2e-4"]),
        (["--packing", "run.yaml"], ["run.yaml", "packing=true"]),
        (["--packing", "method.r=8", "--bf16", "--seed", "-1"], ["method.r=8", "packing=true", "bf16=true", "seed=-1"]),
        (["--load_in_4bit", "True", "--max_steps", "None"], ["load_in_4bit=true", "max_steps=null"]),
        (["--training.max_steps", "5", "--chat_template", "a=b"], ["training.max_steps=5", "chat_template=a=b"]),
        (["--learning_rat", "1"], ["learning_rat=1"]),  # and the key is reported as wrong
        (["--examples", "3", "--html", "x", "-h"], ["--examples", "3", "--html", "x", "-h"]),
        (["--exampels", "3"], ["--exampels", "3"]),
        (["--nonsense", "3"], ["--nonsense", "3"]),
        (["--", "--learning_rate"], ["--", "--learning_rate"]),
    ],
)
def test_keys_as_flags(arguments, want):
    assert as_overrides(arguments, OWN) == want


@pytest.mark.parametrize("name", ["micro_batch_size", "per_device_train_batch_size"])
def test_rows_per_device_are_converted_by_accumulation_and_mesh(load, name):
    text = f"{name}: 3\ntraining: {{gradient_accumulation_steps: 2}}\nmesh: {{data: 4, fsdp: 2, tensor: 2, slices: 2}}\n"
    assert load(text).training.global_batch_size == 3 * 2 * 4 * 2 * 2
    assert "3 rows x 2 accumulation steps x 16 devices" in load.notes[0]
    # the final accumulation counts, and an override of the real key is not multiplied
    assert load(text, "training.gradient_accumulation_steps=5").training.global_batch_size == 3 * 5 * 16
    assert load(text, "training.global_batch_size=4").training.global_batch_size == 4
    assert load("", f"{name}=3").training.global_batch_size == 3
    assert "write training.global_batch_size: 3 x N" in load.notes[0]


def test_alias_beside_its_key_is_refused(load):
    assert "lora_rank means method.r, which is given too" in refusal(load, "lora_rank: 3\nmethod: {r: 4}\n")
    assert "overridden twice, as lr and as optimizer.learning_rate" in refusal(load, "", "lr=1", "optimizer.learning_rate=2")


def test_an_override_replaces_an_alias_in_the_file_and_the_reverse(load):
    assert load("lr: 1\n", "optimizer.learning_rate=2").optimizer.learning_rate == 2
    assert load("optimizer: {learning_rate: 1}\n", "lr=2").optimizer.learning_rate == 2


def test_a_wrong_value_under_an_alias_is_reported_where_it_stands(load):
    assert "run.yaml:3:1: method.r: expected a whole number, found 'x'" in refusal(load, "lora_rank: x\n")
    assert "gradient_checkpointing: only true and false" in refusal(load, "gradient_checkpointing: some\n")


# Overrides and references


def test_override_values(load):
    config = load(
        "optimizer: {groups: [{pattern: a}]}\n",
        "method.target_modules=[q_proj, v_proj]",
        "method.rank_pattern.q_proj=4",
        'data.columns={prompt: no, completion: "1"}',
        "model.revision='7'",
        "model.chat_template={{ messages }}" if False else "model.chat_template=a=b",
        "optimizer.groups.0.freeze=true",
        "data.validation=null",
        "training.seed=1",
        "training.seed=2",
    )
    assert config.method.target_modules == ["q_proj", "v_proj"] and config.method.rank_pattern == {"q_proj": 4}
    assert config.data.columns == {"prompt": "no", "completion": "1"} and config.data.validation is None
    assert config.model.revision == "7" and config.model.chat_template == "a=b"
    assert config.optimizer.groups[0].freeze and config.training.seed == 2


def test_override_replaces_a_section(load):
    assert load("method: {name: lora, r: 4}\n", "method={name: full}").method == FullConfig()


def test_references(load, monkeypatch):
    monkeypatch.setenv("FTJAX_TEST_PLACE", "there")
    config = load(
        "output_dir: runs/${method.name}-${training.seed}-${oc.env:FTJAX_TEST_PLACE}\nmethod: {r: 4, lora_alpha: '${.r}'}\n",
        "data.validation=${data.train}",
    )
    assert config.output_dir == "runs/lora-42-there" and config.method.lora_alpha == 4 and config.data.validation == "a.jsonl"


# Round trips


def test_saved_configuration_loads_equal(load, tmp_path):
    config = load(
        "method: {rank_pattern: {'layers.0.q_proj': 4}, target_modules: '.*(q|v)_proj$'}\noptimizer: {learning_rate: 1e-5, "
        "groups: [{pattern: '^a', learning_rate: 3e-7}]}\n"
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert [p.name for p in tmp_path.iterdir() if "config.yaml" in p.name] == ["config.yaml"]


@pytest.mark.parametrize("text", [
    "mesh: auto",
    "mesh: {auto: true, slices: 2}",
    "objective: {name: classification, problem_type: multi_label_classification}",
    "objective: {name: classification, labels: [a, b]}",
    "objective: {name: kto}",
    "objective: {name: distill, teacher_logprobs: x}",
    "objective: {name: distill, teacher_model_name_or_path: x, use_uld_loss: true}",
    "mesh: {rollout_devices: 4}\nobjective: {name: grpo, rewards: [exact], importance_sampling_correction: token_truncate}",
    "optimizer: {name: adafactor}",
], ids=lambda text: text[:40])  # fmt: skip
def test_settings_that_lead_to_others_load_equal(load, tmp_path, text):
    """The file names what was chosen, what it led to, and all defaults."""
    config = load(text)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "1e-3",
        "no",
        "null",
        "${x}",
        "\\${x}",
        "a\\\\${b",
        "0x1",
        "<<",
        "1_0",
        "",
        " a ",
        "---",
        "x: y",
        "#",
        "10:30",
        "\u2028\x85",
    ]
)
_VALUE = st.recursive(
    _TEXT | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(_TEXT, inner),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=_TEXT, template=_TEXT, columns=st.dictionaries(_TEXT, _TEXT, max_size=3), rate=st.floats(0, 1e3))
def test_any_strings_survive_the_file(tmp_path, path, template, columns, rate):
    config = Config(
        model=ModelConfig(path=path, chat_template=template),
        data=DataConfig(train=path, columns=columns),
        optimizer={"learning_rate": rate},
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@settings(max_examples=200, deadline=None)
@given(_VALUE)
def test_dump_and_read_are_inverse(value):
    reader = Reader("text")
    assert reader.read(dump(value)) == value and reader.problems == []


@given(_TEXT)
def test_escape_and_interpolate_are_inverse(text):
    def fail(path, message):
        raise AssertionError(message)

    assert interpolate({"a": escape(text), "b": 1}, {}, fail)["a"] == text


def test_failed_save_leaves_no_file(tmp_path, load):
    with pytest.raises(OSError):
        save_config(load(), tmp_path / "absent" / "config.yaml")
    assert not (tmp_path / "absent").exists()


def test_diff_names_the_keys(load):
    base = load()
    assert diff_configs(base, base) == []
    assert diff_configs(base, load("", "training.seed=1", "method.r=3")) == ["method.r", "training.seed"]
    assert diff_configs(base, load("", "method.name=full", "training.seed=1")) == ["method.name", "training.seed"]


def test_every_section_is_frozen_and_strict():
    assert set(section_fields()) == {
        "model",
        "method",
        "data",
        "objective",
        "optimizer",
        "training",
        "evaluate",
        "check",
        "mesh",
    }
    for name in section_fields():
        for model in models_at((name,), {}):
            assert model.model_config["frozen"] and model.model_config["extra"] == "forbid"
