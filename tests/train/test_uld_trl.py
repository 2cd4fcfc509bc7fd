"""Loss and gradients of distillation across tokenizers beside TRL's `ULDLoss`, with which `GOLDTrainer` trains."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import pytest
import torch
from merging_tokenizer import save_student, save_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gold import GOLDConfig
from trl.experimental.gold.gold_trainer import ULDLoss
from trl_oracle import FULL, Found, Ours, compare, make_model

ROWS = [
    {"prompt": "what is two plus two?", "completion": " four"},
    {"prompt": "a", "completion": " yes, it is."},
    {"prompt": "name a colour\n", "completion": "red"},
    {"prompt": "x=3; x+1=", "completion": "4, because 3+1=4"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    student, teacher = tmp_path_factory.mktemp("student"), tmp_path_factory.mktemp("teacher")
    make_model(student)
    make_model(teacher, "qwen3", hidden_size=48, num_hidden_layers=3, head_dim=8, vocab_size=80)
    save_student(student)
    save_teacher(teacher)
    return student, teacher


def objective(teacher, **settings):
    return {
        "name": "distill", "teacher_model_name_or_path": str(teacher), "lmbda": 0, "loss_chunk": 16, "use_uld_loss": True,
        **settings,
    }  # fmt: skip


@pytest.fixture(scope="module")
def sides(models):
    student, teacher = models
    ours = Ours(student, ROWS, objective(teacher, uld_use_hybrid_loss=True), FULL, step=0.05)
    return Sides(ours, student, teacher)


class Sides:
    """Student and teacher in PyTorch, and their tokens of each row."""

    def __init__(self, ours, student, teacher):
        self.ours, self.path = ours, teacher
        self.models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, teacher)]
        self.tokenizers = [AutoTokenizer.from_pretrained(path) for path in (student, teacher)]
        self.trained = dict(self.models[0].named_parameters())
        values = ours.tensors(ours.setup.params)
        with torch.no_grad():
            for name, tensor in self.trained.items():
                tensor.copy_(torch.tensor(values[name]).reshape(tensor.shape))

    def __call__(self, *, crossentropy_weight=0.0, temperature=1.0, **settings):
        """TRL averages over the groups of a text, and then over texts; ftjax over all groups."""
        config = GOLDConfig(
            use_uld_loss=True, uld_token_merge_strategy="bayesian", uld_skip_student_eos=False, uld_skip_teacher_eos=False,
            uld_student_temperature=temperature, uld_teacher_temperature=temperature, bf16=False, use_cpu=True,
            gradient_checkpointing=None, **settings,
        )  # fmt: skip
        loss = ULDLoss(config, *self.tokenizers)
        sums, matched, cross_entropy, groups, tokens = 0.0, 0.0, 0.0, 0, 0
        for row in ROWS:
            made = [self.tokens(tokenizer, row) for tokenizer in self.tokenizers]
            (ids, labels, offsets), (other_ids, other_labels, other_offsets) = made
            logits = self.models[0](input_ids=ids).logits
            with torch.no_grad():
                other = self.models[1](input_ids=other_ids).logits
            found = loss(logits, other, labels, other_labels, ids, other_ids, offsets, other_offsets)
            answers = [
                where[0][label[0] != -100].tolist() for where, label in ((offsets, labels), (other_offsets, other_labels))
            ]
            count = len(loss._align_by_byte_offsets(*answers)[0])
            sums, groups = sums + count * found, groups + count
            if config.uld_use_hybrid_loss:
                matched += count * loss.last_matched_loss.item()
            cross_entropy += torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
            tokens += int((labels != -100).sum())
        divergence, nll = sums / groups, cross_entropy / tokens
        self.models[0].zero_grad()
        (divergence + crossentropy_weight * nll).backward()
        metrics = {"divergence": divergence.item(), "cross_entropy": nll.item()}
        if config.uld_use_hybrid_loss:
            metrics["matched"] = matched / groups
        gradients = {name: tensor.grad.numpy().copy() for name, tensor in self.trained.items()}
        return Found(divergence.item() + crossentropy_weight * nll.item(), metrics, gradients)

    @staticmethod
    def tokens(tokenizer, row):
        """Ids, labels and byte offsets of a row, relative to its answer."""
        prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        ends = np.cumsum([len(tokenizer.decode([one])) for one in answer]).tolist()
        offsets = [(0, 0)] * len(prompt) + list(zip([0, *ends[:-1]], ends, strict=True)) + [(ends[-1], ends[-1])]
        ids = [*prompt, *answer, tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        return tuple(torch.tensor([values]) for values in (ids, labels, offsets))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.5, "crossentropy_weight": 0.75},
        {"uld_use_hybrid_loss": True, "beta": 0.0, "crossentropy_weight": 0.25},
        {"uld_use_hybrid_loss": True, "beta": 0.3, "temperature": 0.7},
        {
            "uld_use_hybrid_loss": True, "beta": 1.0, "uld_hybrid_matched_weight": 0.4, "uld_hybrid_unmatched_weight": 2.0,
        },
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()) or "sorted",
)  # fmt: skip
def test_trl(sides, settings):
    names = {"divergence", "cross_entropy", *(["matched"] if "uld_use_hybrid_loss" in settings else [])}
    compare(sides.ours.whole(**objective(sides.path, **settings)), sides(**settings), names)


def test_both_sides_have_groups_of_several_tokens(sides):
    """Or factors of groups would not be compared, nor tokens that only one of the vocabularies has."""
    labels = sides.ours.batch["labels"].reshape(*sides.ours.batch["tokens"].shape, -1)
    own, theirs = (np.count_nonzero(labels[..., place]) for place in (4, 3))
    assert own >= 2 and theirs >= 2
    matches = sides.ours.setup.teacher.matches
    assert len({own for own, _ in matches}) == len(matches) < min(len(tokenizer) for tokenizer in sides.tokenizers)
