"""Loss and gradients of distillation beside TRL's: those of `GKDTrainer` and `DistillationTrainer` on the same documents."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from functools import cached_property

import jax
import jax.numpy as jnp
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss
from trl_oracle import FULL, LORA, Found, Ours, compare, make_model

from ftjax.objectives import objective_of
from ftjax.train.setup import _loss_inputs

ROWS = [
    {"prompt": "What is two plus two?", "completion": " four"},
    {"prompt": "a", "completion": " yes, it is."},
    {"prompt": "Name a colour (one word)\n", "completion": "red"},
    {"prompt": "x=3; x+1=", "completion": "4, because 3+1=4"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    student, teacher = tmp_path_factory.mktemp("student"), tmp_path_factory.mktemp("teacher")
    return make_model(student), make_model(teacher, "qwen3", hidden_size=48, num_hidden_layers=3, head_dim=8)


def objective(teacher, **settings):
    return {"name": "distill", "teacher_model_name_or_path": str(teacher), "lmbda": 0, "loss_chunk": 16, **settings}


@pytest.fixture(scope="module")
def full(models):
    student, teacher = models
    return Sides(Ours(student, ROWS, objective(teacher), FULL, step=0.05), student, teacher)


@pytest.fixture(scope="module")
def lora(models):
    student, teacher = models
    return Sides(Ours(student, ROWS, objective(teacher), LORA, step=0.05), student, teacher)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


class Sides:
    """A student with its teacher on both sides."""

    def __init__(self, ours, student, teacher):
        self.ours, self.path = ours, teacher
        self.student, self.teacher = map(load, (student, teacher))
        method = ours.setup.config.method
        if method.name == "lora":
            config = LoraConfig(r=method.r, lora_alpha=method.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
            self.student = get_peft_model(self.student, config)
        self.trained = {name: tensor for name, tensor in self.student.named_parameters() if tensor.requires_grad}
        values = ours.tensors(ours.setup.params)
        assert self.trained.keys() == values.keys()
        with torch.no_grad():
            for name, tensor in self.trained.items():
                tensor.copy_(torch.tensor(values[name]).reshape(tensor.shape))
        documents = ours.documents()
        longest = max(len(tokens) for tokens, _ in documents)
        self.ids, self.there, self.labels = (torch.full((len(documents), longest), fill) for fill in (0, 0, -100))
        for row, (tokens, trained) in enumerate(documents):
            size = len(tokens)
            self.ids[row, :size], self.there[row, :size] = torch.tensor(tokens), 1
            self.labels[row, :size] = torch.where(torch.tensor(trained) > 0, self.ids[row, :size], -100)

    def quick(self, **settings):
        """Loss and gradients as `Ours.whole` has them, but with hidden states that are computed once for all settings."""
        setup, batch = self.ours._with(objective(self.path, **settings)), self.ours.batch
        hidden, others, pull = self.hidden

        def mean(params, hidden):
            inputs = _loss_inputs(setup, params, setup.frozen, batch, setup.runtime.context(batch))
            inputs.__dict__["_hidden"], inputs.teacher.__dict__["_hidden"] = (hidden, 0.0), (others, 0.0)
            totals, _ = objective_of(setup.config).loss(inputs)
            return totals.loss / totals.weight, totals

        (gradients, back), totals = jax.jit(jax.grad(mean, (0, 1), has_aux=True))(setup.params, hidden)
        return self.ours._found(setup, [totals], jax.tree.map(jnp.add, gradients, pull(back)))

    @cached_property
    def hidden(self):
        """Hidden states of student and teacher, and the function from a gradient of the former to those of the weights."""
        setup, batch = self.ours.setup, self.ours.batch

        def of(params):
            inputs = _loss_inputs(setup, params, setup.frozen, batch, setup.runtime.context(batch))
            return inputs.hidden, inputs.teacher.hidden

        pull = jax.jit(lambda back: jax.vjp(lambda params: of(params)[0], setup.params)[1](back)[0])
        return *jax.jit(of)(setup.params), pull

    def gkd(self, *, beta, temperature, weight=1.0, crossentropy=0.0):
        """The loss of GKDTrainer (its static function), and transformers' cross-entropy."""
        student = self.student(input_ids=self.ids, attention_mask=self.there).logits[:, :-1]
        with torch.no_grad():
            teacher = self.teacher(input_ids=self.ids, attention_mask=self.there).logits[:, :-1]
        labels = self.labels[:, 1:]
        loss = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=temperature)
        nll = torch.nn.functional.cross_entropy(student.flatten(0, 1), labels.flatten())
        return self.found(weight * loss + crossentropy * nll, {"divergence": loss.item(), "cross_entropy": nll.item()})

    def distillation(self, *, beta, temperature):
        """The loss of DistillationTrainer, from hidden states."""
        student = self.student.model(input_ids=self.ids, attention_mask=self.there).last_hidden_state[:, :-1]
        with torch.no_grad():
            teacher = self.teacher.model(input_ids=self.ids, attention_mask=self.there).last_hidden_state[:, :-1]
        mask = (self.labels[:, 1:] != -100).int()
        loss, entropy, count = _chunked_divergence_loss(
            student, teacher, self.student.lm_head.weight, self.teacher.lm_head.weight, mask, beta, temperature=temperature
        )
        return self.found(loss, {"entropy": (entropy / count).item()})

    def found(self, loss, metrics):
        self.student.zero_grad()
        loss.backward()
        assert all(tensor.grad is None for tensor in self.teacher.parameters())
        return Found(loss.item(), metrics, {name: tensor.grad.numpy().copy() for name, tensor in self.trained.items()})


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_gkd(full, beta, temperature):
    ours = full.quick(beta=beta, temperature=temperature)
    compare(ours, full.gkd(beta=beta, temperature=temperature), {"divergence", "cross_entropy"})
    assert ours.loss == pytest.approx(ours.metrics["divergence"]) and ours.loss > 0.01


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation_trainer(full, beta):
    compare(full.quick(beta=beta, temperature=1.5), full.distillation(beta=beta, temperature=1.5), {"entropy"})


def test_another_beta_differs(full):
    """The comparison can fail."""
    theirs = full.gkd(beta=0.1, temperature=1.0)
    with pytest.raises(AssertionError, match="rtol"):
        compare(full.quick(beta=0.2), theirs, set())


def test_a_whole_loss_mixed_with_cross_entropy(lora):
    """The loss as training computes it. The temperature of the cross-entropy is 1, whatever that of the divergence."""
    mixed = objective(lora.path, beta=0.5, temperature=2.0, distillation_weight=0.25, crossentropy_weight=0.75)
    theirs = lora.gkd(beta=0.5, temperature=2.0, weight=0.25, crossentropy=0.75)
    compare(lora.ours.whole(**mixed), theirs, {"cross_entropy", "divergence"})
