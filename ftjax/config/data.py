"""`data:` -- the source of the examples, and how they become rows of tokens."""

import codecs
import string
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ftjax.config.base import Section

_SYNONYMS = {
    "alpaca": "instruction", "sharegpt": "conversations", "chatml": "messages", "tokenized": "input_ids",
    "kto": "unpaired_preference", "dpo": "preference",
}  # fmt: skip
Format = Annotated[
    Literal[
        "auto", "messages", "conversations", "prompt_completion", "preference", "unpaired_preference", "unpaired_messages",
        "prompt",
        "instruction", "question_answer", "document_summary", "text_label", "text", "input_ids",
    ],
    BeforeValidator(lambda value: _SYNONYMS.get(value, value) if isinstance(value, str) else value),
]  # fmt: skip


def template_fields(template: str) -> list[str]:
    """Return the column names in `Question: {question}\\nAnswer:`; `{{` and `}}` are literal braces.

    Raises ValueError if it is not such a template.
    """
    names = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or spec or conversion or not all(c.isalnum() or c in "_- " for c in name):
            raise ValueError(f"{template!r} is not a template: write columns as {{name}}, and braces as {{{{ and }}}}")
        names.append(name)
    return names


def _checked_template(template: str | None) -> str | None:
    if template is not None and not template_fields(template):
        raise ValueError(f"{template!r} names no column; write columns as {{name}}, such as 'Question: {{question}}\\nAnswer:'")
    return template


def _checked_encoding(name: str | None) -> str | None:
    try:
        if name is None or (found := codecs.lookup(name))._is_text_encoding:
            return name and found.name
        raise LookupError(name)
    except LookupError:
        raise ValueError(f"{name!r} is not an encoding that Python knows, such as utf-8, utf-16, cp1252 or shift_jis") from None


def _checked_delimiter(value: str | None) -> str | None:
    value = {"\\t": "\t", "tab": "\t"}.get(value, value)
    if value is not None and (len(value) != 1 or value in '"\r\n'):
        raise ValueError(f"{value!r} is not a delimiter; write one character, such as ';'")
    return value


Delimiter = Annotated[str | None, BeforeValidator(_checked_delimiter)]
Encoding = Annotated[str | None, BeforeValidator(_checked_encoding)]
SampleBy = Literal["line", "paragraph", "document"] | None
OF_DATA = "of this source; null: as in data"


class SourceConfig(Section):
    """One part of a mixture; null settings are taken from `data`."""

    path: str = Field(min_length=1, description="a file, a folder, a glob or a Hub id")
    weight: float = Field(
        1.0, gt=0, description="how many times an epoch sees each row; 0.5: half of them, then the other half"
    )
    split: str | None = Field(None, description="split of a Hub data set; null: train, or validation")
    subset: str | None = Field(None, description="configuration of a Hub data set that has several")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub data set")
    format: Format | None = Field(None, description=OF_DATA)
    columns: dict[str, str] | None = Field(None, description=OF_DATA)
    template: str | None = Field(None, description=OF_DATA)
    completion_template: str | None = Field(None, description=OF_DATA)
    delimiter: Delimiter = Field(None, description=OF_DATA)
    encoding: Encoding = Field(None, description=OF_DATA)
    sample_by: SampleBy = Field(None, description=OF_DATA)
    limit: int | None = Field(None, ge=1, description=OF_DATA)

    _check = field_validator("template", "completion_template")(_checked_template)


Sources = str | SourceConfig | list[str | SourceConfig]


# Settings that a source may override; otherwise `data`'s apply.
OF_EACH = ("format", "columns", "template", "completion_template", "delimiter", "encoding", "sample_by", "limit")


class DataConfig(Section):
    """Training and validation data."""

    train: Sources = Field(description="a file, a folder, a glob, a Hub id, or a list of {path, weight, ...}")
    validation: Sources | None = Field(None, description="validation data, named as train; null: none, or validation_split")
    validation_split: float | None = Field(
        None, gt=0, description="if validation is null: a share (below 1) or number of train rows to hold out, by content"
    )
    format: Format = Field("auto", description="what the columns mean; auto: found from their names and values")
    columns: dict[str, str] = Field(default_factory=dict, description="ftjax's column name: the file's column name")
    template: str | None = Field(None, description="the prompt, with columns as {name}: 'Question: {question}\\nAnswer:'")
    completion_template: str | None = Field(None, description="the completion, with columns as {name}, used exactly")
    delimiter: Delimiter = Field(None, description="of CSV files; null: detected from their first lines")
    encoding: Encoding = Field(None, description="of text files; null: UTF-8, or as a BOM says, or Excel's cp1252 if detected")
    sample_by: SampleBy = Field(None, description="unit of a row in .txt and .md; null: a line of .txt, a whole .md")
    limit: int | None = Field(None, ge=1, description="only this many first rows of each source")
    shuffle: bool = Field(True, description="false: epochs keep the order of the data")
    prompt_format: Literal["auto", "chat", "raw"] = Field(
        "auto", description="apply the chat template to text prompts: if there is one (auto), always, or never"
    )
    max_length: int = Field(1024, ge=2, description="tokens of a row of the batch, and the most of a document")
    packing: bool = Field(True, description="fill rows with several documents, which do not see each other")
    mix_epochs: bool = Field(False, description="fill the last batch of an epoch with the first rows of the next")
    truncation: Literal["drop", "right", "left", "middle", "split", "error"] = Field(
        "drop", description="documents over max_length: dropped, cut at one side or in the middle, split, or an error"
    )
    train_on_inputs: bool = Field(False, description="train every token, not only the completion or the assistant's turns")
    last_turn_only: bool = Field(False, description="train only the assistant's last turn of a conversation")
    special_tokens_in_text: Literal["encode", "split", "error"] = Field(
        "split",
        description="control tokens that a message spells (<|im_end|> in a user's text): tokens, plain text, or an error",
    )
    fold_system: bool = Field(
        True,
        description="put a system message that the chat template does not take before the first user's; false: an error",
    )
    on_error: Literal["error", "skip"] = Field("error", description="a broken row ends the run, or is skipped and counted")
    drop_empty: bool = Field(False, description="drop and count rows whose text or completion is empty")
    min_tokens: int | None = Field(None, ge=1, description="drop rows of fewer tokens")
    max_tokens: int | None = Field(None, ge=1, description="drop rows of more tokens, before truncation")
    deduplicate: Literal["none", "exact", "near"] = Field(
        "none", description="drop rows whose text is that of another, or nearly"
    )
    near_duplicate_threshold: float = Field(0.8, gt=0, le=1, description="Jaccard similarity of 3-grams of words")
    unicode_normalization: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = Field(
        None, description="form into which all texts are brought; null: as they are"
    )
    personal_data: Literal["keep", "mask"] = Field(
        "keep", description="mask: a placeholder such as [EMAIL] for each email address, phone, card number, IBAN and key"
    )
    contamination: Literal["ignore", "report", "drop"] = Field(
        "report", description="rows of validation that are also in train: report them, or drop them from train"
    )
    streaming: bool = Field(False, description="for sets larger than the disk: no cache, packed window by window")
    num_proc: int = Field(1, ge=1, description="processes that read and tokenise; tokenising alone uses all cores anyway")

    _check = field_validator("template", "completion_template")(_checked_template)

    @field_validator("deduplicate", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        """Map `false` and null to none, and `true` to exact."""
        return {None: "none", False: "none", True: "exact"}.get(value, value) if value in (None, False, True) else value

    @field_validator("train", "validation")
    @classmethod
    def _something(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("an empty list names no data; write a file, a folder, a glob or a Hub id")
        return value

    @model_validator(mode="after")
    def _agrees(self) -> "DataConfig":
        if self.validation is not None and self.validation_split is not None:
            raise ValueError("validation and validation_split are both given; keep one of them")
        if self.validation_split is not None and self.validation_split >= 1 and self.validation_split % 1:
            raise ValueError(f"validation_split {self.validation_split} is neither a share below 1 nor a number of rows")
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        if self.last_turn_only and self.train_on_inputs:
            raise ValueError("last_turn_only and train_on_inputs contradict each other; keep one of them")
        if self.mix_epochs and not self.packing:
            raise ValueError("mix_epochs goes with packing: true only")
        if self.streaming:
            wants = {
                "validation_split": self.validation_split is not None,
                "deduplicate": self.deduplicate != "none",
                "contamination: drop": self.contamination == "drop",
                "packing: false": not self.packing,
                "mix_epochs": self.mix_epochs,
            }
            if any(wants.values()):
                names = ", ".join(name for name, wanted in wants.items() if wanted)
                raise ValueError(f"streaming sees a window of the data at a time, which does not go with {names}")
        return self

    @property
    def reading(self) -> tuple[str, str, bool]:
        """Settings for rendering an example with a chat template, as keywords of `Example.with_source`."""
        return self.prompt_format, self.special_tokens_in_text, self.fold_system

    def sources(self, which: Literal["train", "validation"]) -> list[SourceConfig]:
        """Return the sources of a set, completed with `data`'s settings; [] if there are none."""
        given = getattr(self, which)
        parts = given if isinstance(given, list) else [] if given is None else [given]
        resolved = []
        for part in parts:
            source = SourceConfig(path=part) if isinstance(part, str) else part
            own = {name: getattr(source, name) for name in OF_EACH}
            shared = {name: getattr(self, name) for name, value in own.items() if value is None}
            resolved.append(source.model_copy(update={"split": source.split or which, **shared}))
        return resolved
