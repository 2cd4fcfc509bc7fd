"""Tests that several processes give the results of one, on every kind of mesh: losses, evaluations, trained tokens, weights.

Each case is a mesh, a configuration that combines several features, and a number of processes and devices. Together they pair
every kind of mesh with every configuration, and each of both with every processes x devices. `make test-all` runs all of them,
`make test` those in SLICE: every configuration once, and every axis.
"""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from processes import ALL, make_settings, rows, run, same_losses, whole_run
from safetensors.numpy import load_file

MESHES = {
    "data": {"data": 4, "fsdp": 1},
    "fsdp": {"fsdp": 4},
    "tensor": {"fsdp": 1, "tensor": 4},  # across processes in each layout
    "fsdp x tensor": {"fsdp": 2, "tensor": 2},  # tensor inside a process of two devices, across processes of one
    "tensor outside": {"fsdp": 1, "data": 2, "tensor": 2},
    "sequence": {"fsdp": 1, "sequence": 4},
    "fsdp x sequence": {"fsdp": 2, "sequence": 2},
    "tensor x sequence": {"fsdp": 1, "tensor": 2, "sequence": 2},
    "expert": {"fsdp": 1, "expert": 4},
    "fsdp x expert": {"fsdp": 2, "expert": 2},
    "slices": {"data": 2, "fsdp": 2, "slices": 2},
}

AXES = {axis for sizes in MESHES.values() for axis, size in sizes.items() if size > 1}

LORA = {"name": "lora", "r": 4, "lora_alpha": 8}
CLASSES = {"name": "classification", "labels": ["short", "long"], "head": True}


@dataclass(frozen=True)
class Features:
    """The features of a run besides its mesh: changes of the settings by section."""

    sections: dict = field(default_factory=dict)
    microbatches: int = 1
    sparse: bool = True  # requires a mixture of experts


FEATURES = {
    # dropout and a router's loss depend on microbatches; 13 rows do not divide; answers are generated during training
    "lora": Features(
        {
            "method": {**LORA, "lora_dropout": 0.3},
            "data": {"validation": "{folder}/thirteen.jsonl"},
            "training": {"eval_steps": 2},
            "evaluate": {"training_prompts": ["abc", "fed"], "training_max_new_tokens": 4},
        },
        microbatches=2,
    ),
    "full": Features(
        {
            "method": {"name": "full"},
            "data": {"packing": False},
            "training": {"eval_steps": 1, "early_stopping_patience": 1, "early_stopping_threshold": 0.5, "save_steps": 1},
        }
    ),
    "int8": Features({"model": {"quantization": "int8"}, "method": LORA, "data": {"streaming": True}}, sparse=False),
    "prefix": Features(
        {
            "method": {"name": "prefix_tuning", "num_virtual_tokens": 4},
            "evaluate": {"training_prompts": ["abc"], "training_max_new_tokens": 4},
        },
        microbatches=2,
    ),
    "classes": Features(
        {
            "method": LORA,
            "objective": CLASSES,
            "data": {"train": "{folder}/classes.jsonl", "validation": "{folder}/classes.jsonl"},
            "evaluate": {"training_rows": 5},
            "training": {"eval_steps": 2},
        },
        sparse=False,
    ),
    "labels": Features(
        {
            "method": LORA,
            "objective": {"name": "classification", "problem_type": "multi_label_classification"},
            "data": {"train": "{folder}/labels.jsonl", "validation": "{folder}/labels.jsonl"},
            "evaluate": {"training_rows": 5},
            "training": {"eval_steps": 2},
        },
        microbatches=2,
        sparse=False,
    ),
    # compares the pairs of a whole update in order
    "dpo": Features(
        {
            "method": {**LORA, "lora_dropout": 0.3},
            "objective": {"name": "dpo", "loss_type": ["sigmoid", "aot_unpaired", "sft"]},
            "data": {"train": "{folder}/pairs.jsonl", "validation": "{folder}/pairs.jsonl", "contamination": "ignore"},
            "training": {"eval_steps": 2},
        },
        microbatches=2,
    ),
    # has a mean over the whole update
    "kto": Features(
        {
            "method": {"name": "full"},
            "objective": {"name": "kto"},
            "data": {"train": "{folder}/wanted.jsonl", "validation": "{folder}/wanted.jsonl", "contamination": "ignore"},
            "training": {"eval_steps": 2},
        },
        microbatches=2,
    ),
}
EVALUATED = (
    "eval/loss", "eval/token_accuracy", "eval/accuracy", "eval/subset_accuracy", "eval/micro_f1", "eval/rewards/margins",
    "eval/logps/rejected", "eval/nll_loss", "eval/kl",
)  # fmt: skip
LAYOUTS = ((2, 2), (4, 1))  # processes x devices of each
LINES = [
    (mesh, name, LAYOUTS[(number + place) % 2])
    for number, mesh in enumerate(MESHES)
    for place, (name, features) in enumerate(FEATURES.items())
    if features.sparse or "expert" not in mesh
]
CHOSEN = {
    ("tensor", "lora"), ("fsdp x expert", "full"), ("slices", "int8"), ("fsdp x sequence", "prefix"), ("sequence", "labels"),
    ("tensor outside", "dpo"), ("fsdp x sequence", "kto"),
}  # fmt: skip
FOUR = ("slices", "int8")  # as four processes; two take half of the time
SLICE = [(*line[:2], LAYOUTS[line[:2] == FOUR]) for line in LINES if line[:2] in CHOSEN]


def test_every_mesh_meets_all_features():
    met = {(mesh, name) for mesh, name, _ in LINES}
    assert met == {(m, n) for m in MESHES for n in FEATURES if FEATURES[n].sparse or "expert" not in m}
    for mesh in MESHES:
        assert {layout for one, _, layout in LINES if one == mesh} == set(LAYOUTS)
    assert {name for _, name, _ in SLICE} == set(FEATURES) - {"classes"}  # `labels` has such a head
    assert {axis for mesh, _, _ in SLICE for axis, size in MESHES[mesh].items() if size > 1} == AXES


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Return the settings for a dense model or a mixture of experts, written once."""
    made = {}

    def of(sparse: bool) -> dict:
        if sparse not in made:
            folder = tmp_path_factory.mktemp("experts" if sparse else "dense")
            more = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1} if sparse else {}
            settings = make_settings(folder, "mixtral" if sparse else "llama", num_key_value_heads=4, **more)
            lines = (folder / "train.jsonl").read_text().splitlines()
            (folder / "thirteen.jsonl").write_text("\n".join(lines[:13]) + "\n")
            words = [json.loads(line)["prompt"] for line in lines[:80]]
            labelled = [{"text": word, "label": "long" if len(word) > 6 else "short"} for word in words]
            (folder / "classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
            several = [{"text": word, "label": [letter for letter in "abc" if letter in word]} for word in words]
            (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several))
            pairs = [{"prompt": word, "chosen": word[::-1], "rejected": word.upper()} for word in words]
            (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
            wanted = [
                {"prompt": word, "completion": word[::-1] if n % 3 else word.upper(), "label": n % 3 > 0}
                for n, word in enumerate(words)
            ]
            (folder / "wanted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wanted))
            made[sparse] = folder, settings
        return made[sparse]

    return of


def settings_of(folder, settings: dict, features: Features, mesh: dict) -> dict:
    """Return the settings of a run of four updates."""
    found = {**settings, "mesh": mesh, "evaluate": {"training_examples": 0}}
    found["training"] = {
        **settings["training"], "max_steps": 4, "gradient_accumulation_steps": features.microbatches, "save_steps": 100,
    }  # fmt: skip
    for section, values in features.sections.items():
        text = json.loads(json.dumps(values).replace("{folder}", str(folder)))
        found[section] = text if section in ("method", "objective") else {**found.get(section, {}), **text}
    return found


@pytest.mark.parametrize("mesh, name, layout", LINES if ALL else SLICE, ids=lambda value: str(value).replace(" ", ""))
def test_processes_are_one(mesh, name, layout, folder_of, tmp_path):
    folder, settings = folder_of("expert" in mesh)
    settings = settings_of(folder, settings, FEATURES[name], MESHES[mesh])
    one, many = tmp_path / "one", tmp_path / "many"
    whole_run(settings, one, devices=4)
    running, said = run(layout[0], settings, many, devices=layout[1])
    assert not any(process.returncode for process in running), "\n".join(said)
    got, want = rows(many), rows(one)
    assert list(got) == list(want) and len(want) == (2 if name == "full" else 4)
    same_losses(got, want, 1e-5)
    for metric in EVALUATED:
        ours, theirs = rows(many, metric), rows(one, metric)
        assert list(ours) == list(theirs)
        for step in theirs:
            assert ours[step][metric] == pytest.approx(theirs[step][metric], abs=1e-5), (metric, step)
    ours, theirs = rows(many, "eval/generations"), rows(one, "eval/generations")
    assert [row["eval/generations"] for row in ours.values()] == [row["eval/generations"] for row in theirs.values()]
    assert bool(theirs) == ("training_prompts" in settings["evaluate"])
    compared = 0
    for file in (one / "final").glob("*.safetensors"):
        ours, theirs = (load_file(path) for path in (many / "final" / file.name, file))
        assert ours.keys() == theirs.keys()
        for tensor in theirs:
            np.testing.assert_allclose(ours[tensor], theirs[tensor], atol=1e-5, rtol=0, err_msg=tensor)
            compared += 1
    assert compared
