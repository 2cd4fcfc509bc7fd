"""Interface of an objective: a record of functions, most of them optional."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Float32, Int, Shaped

from ftjax.config import Config, Section
from ftjax.data.encoding import RowEncoding
from ftjax.models.model import Model
from ftjax.models.nn.context import Context
from ftjax.objectives.logprobs import TokenLogprobs, token_logprobs
from ftjax.objectives.loss import LossTotals, Measure, cross_entropy, token_totals, trained_first
from ftjax.objectives.projection import Projection, beside, one_device, projection


class Head(NamedTuple):
    """A classification head that an objective trains.

    Attributes:
        classes: the names of its outputs, by index; None if only the data can tell.
        problem_type: transformers' name for the meaning of its scores.
    """

    classes: tuple[str, ...] | None
    problem_type: str


@dataclass(frozen=True)
class Forward:
    """A model with parameters, on one batch.

    Attributes:
        model: with its method.
        trainable: the parameters to differentiate, by path; empty for a reference model.
        frozen: the other parameters.
        batch: its arrays (`ftjax.data.batch`).
        ctx: context of the batch.
        chunk: tokens of the batch whose logits exist at one time.
    """

    model: Model
    trainable: Mapping[str, jax.Array]
    frozen: Mapping[str, jax.Array]
    batch: Mapping[str, Shaped[Array, "B _"]]
    ctx: Context
    chunk: int

    @cached_property
    def _hidden(self) -> tuple[jax.Array, jax.Array]:
        found, _, auxiliary = self.model.bind({**self.frozen, **self.trainable}).hidden(self.batch["tokens"], self.ctx)
        return found, auxiliary

    def after(self, found: Any) -> "Forward":
        """Return the same model, whose pass begins when these arrays have been computed.

        Loops that do not depend on each other run in any order, which may differ from device to device. If both have
        collectives, devices of a CPU then wait for each other forever.
        """
        tokens, _ = jax.lax.optimization_barrier((self.batch["tokens"], jax.lax.stop_gradient(found)))
        return replace(self, batch={**self.batch, "tokens": tokens})

    @property
    def hidden(self) -> Float[Array, "B T E"]:
        """Final hidden states."""
        return self._hidden[0]

    @property
    def auxiliary(self) -> Float[Array, ""]:
        """The model's own loss, such as a router's."""
        return self._hidden[1]

    def chunk_length(self, shape: tuple[int, int]) -> int:
        """Return the tokens per row `[B, T]` that make a chunk of about `chunk` tokens."""
        rows, length = shape
        return min(length, max(1, self.chunk // rows))

    @cached_property
    def output(self) -> Projection:
        """The projection of hidden states to the vocabulary."""
        return projection(self.model, self.trainable, self.frozen, self.ctx)

    def token_totals(self, targets: Any = None, measure: Measure = cross_entropy, values: Any = None) -> LossTotals:
        """Sum a loss that is a weighted sum over tokens; its logits are computed once (`ftjax.objectives.loss`).

        Args:
            targets: `[B, T, ...]`, or a tree of such arrays; None for the batch's.
            measure: function of logits, targets and the batch's weights.
            values: differentiated values `[B, T]`; `measure` then takes `(logits, values)` in place of logits.
        """
        hidden, output = self.hidden, self.output
        if values is not None:
            hidden, output = (hidden, values), beside(output)
        tokens = hidden, self.batch["targets"] if targets is None else targets, self.batch["weights"]
        alone = one_device()
        if alone:
            tokens = trained_first(*tokens)
        length = self.chunk_length(tokens[-1].shape)
        return token_totals(output.unembed, length, output.trained, *tokens, output.arrange, alone, measure)

    def token_logprobs(
        self,
        wanted: Shaped[Array, "B T"] | None = None,
        *,
        entropy: bool = False,
        top: int = 0,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """Compute the log-probability of each target with weight (`ftjax.objectives.logprobs`).

        Args:
            wanted: zero at targets to leave out; None: the batch's weights.
        """
        if wanted is None and not (entropy or top) and temperature == 1:
            return self._logprobs
        wanted = self.batch["weights"] if wanted is None else wanted
        return self._token_logprobs(wanted, entropy, top, temperature)

    @cached_property
    def _logprobs(self) -> TokenLogprobs:
        return self._token_logprobs(self.batch["weights"], False, 0, 1.0)

    def _token_logprobs(self, wanted: jax.Array, entropy: bool, top: int, temperature: float) -> TokenLogprobs:
        hidden, targets = self.hidden, self.batch["targets"]
        length = self.chunk_length(wanted.shape)
        return token_logprobs(self.output, hidden, targets, length, wanted, entropy=entropy, top=top, temperature=temperature)

    def scores(self) -> Float32[Array, "B T classes"]:
        """Compute the outputs of a head at every token."""
        return self.output.unembed(self.output.trained, self.hidden)


@dataclass(frozen=True)
class LossInputs(Forward):
    """Inputs of a loss: the trained model on one batch.

    Attributes:
        config: configuration of the run.
        reference: the model as it was before training, on the same batch; None if the objective needs none.
        teacher: another model, on the same batch; None if the objective has none.
        matches: ids of tokens that the model's vocabulary and the teacher's share, `(own, teacher's)`, if tokenizers differ.
        own_statistics: the objective's `statistics`.
        all_statistics: its statistics of all microbatches of the update, stacked on axis 0; None if this is the only one.
        number: the index of this microbatch.
    """

    config: Config
    reference: Forward | None = None
    teacher: Forward | None = None
    matches: Sequence[tuple[int, int]] | None = None
    own_statistics: "Statistics | None" = None
    all_statistics: Any = None
    number: Int[Array, ""] | int = 0

    @cached_property
    def reference_after(self) -> Forward:
        """The reference model, whose pass begins after the log-probabilities of the model itself."""
        return self.reference.after(self.token_logprobs().logprobs)

    @cached_property
    def statistics(self) -> Any:
        """Statistics of all microbatches, stacked on axis 0, without gradients (`Objective.statistics`)."""
        if self.all_statistics is not None:
            return self.all_statistics
        return jax.tree.map(lambda x: jax.lax.stop_gradient(x)[None], self.own_statistics(self))


# -> arrays of one microbatch that the loss of all of them needs
Statistics = Callable[[LossInputs], Any]
# -> (totals, auxiliary loss [], which counts once per unit of the totals' weight)
Loss = Callable[[LossInputs], tuple[LossTotals, jax.Array]]


@dataclass(frozen=True)
class Objective:
    """An objective, and all of the program that depends on it.

    Attributes:
        config: its section of the configuration.
        encoding: `(section)` -> encoding of rows of data into documents, which determines the arrays of a batch.
        loss: loss of one batch. Its totals name the metrics, which are logged as `train/NAME` and `eval/NAME`.
        derived: `(section, means)` -> further values to report, from the means of the loss and the metrics by name. An
            evaluation always reports them, and they replace a mean of the same name; training does if it computes metrics.
        head: `(section)` -> the head that is trained in place of the projection to the vocabulary; None for no head.
        reference: `(section)` -> whether the loss needs the model as it was before training.
        teacher: `(section)` -> the name and the revision of another model that the loss learns from, or None.
        precomputed: `(section)` -> function of the reference model's forward pass that returns a value for each document of a
            batch, `[B, documents]`, computed once before training and carried by the documents; None: no such value.
        moving: `(section)` -> (updates, share): every so many updates the reference model moves by that share towards the
            model; None: it stays.
        complete: `(config)` -> the configuration with what only the data can tell. Raises UserError.
        statistics: what the loss of an update depends on besides its own microbatch, such as a mean over all rows. Computed for
            every microbatch before the losses, without gradients; None if the loss is a sum over rows.
        warning: `(section, means)` -> what looks wrong in a row of training metrics, or None.
        generates: `(section)` -> whether the documents of a batch are answers to prompts that the model in training generates;
            an update then counts documents, not rows.
        train_metrics: compute the metrics in updates, too. False leaves them to evaluations, where the loss alone is cheaper.
    """

    config: type[Section]
    encoding: Callable[[Any], RowEncoding]
    loss: Loss
    derived: Callable[[Any, Mapping[str, float]], dict[str, float]] = lambda section, means: {}
    head: Callable[[Any], Head | None] = lambda section: None
    reference: Callable[[Any], bool] = lambda section: False
    teacher: Callable[[Any], tuple[str, str | None] | None] = lambda section: None
    precomputed: Callable[[Any], Callable[[Forward], jax.Array] | None] = lambda section: None
    moving: Callable[[Any], tuple[int, float] | None] = lambda section: None
    complete: Callable[[Config], Config] = lambda config: config
    statistics: Statistics | None = None
    warning: Callable[[Any, Mapping[str, float]], str | None] = lambda section, means: None
    train_metrics: bool = True
    generates: Callable[[Any], bool] = lambda section: False
