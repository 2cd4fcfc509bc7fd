"""Warnings that follow from the counts of a data set."""

from ftjax.data.encoding import ANSWERS, RowEncoding
from ftjax.data.report import DataReport

# reasons for which rows are dropped
BROKEN, EMPTY, MASKED, UNWANTED = "broken (on_error: skip)", "empty", "without a trained token", "with label false"
LONG = "longer than max_length"
LONG_PROMPT = "longer than max_length - max_completion_length"
COUNTED = {  # encoder notes and their warnings: "in 3 rows ...", or documents where a row has several
    "prompt differs": "the chat template's generation prompt is not what it writes before the answer (some begin it with "
    "<think>): they are trained on the text without that beginning, and generation adds it. Set model.chat_template to a "
    "version that writes both alike, or write the beginning into the answers",
    "prompt ids differ": "the ids before an answer are not those that generation makes, as an earlier boundary between "
    "prompt and answer is tokenised apart; data.last_turn_only: true has one answer a row, and no such difference",
    "answer left out": "the chat template leaves out a part of a trained answer (such as reasoning in <think>); set "
    "model.chat_template to a version that writes all of it",
    "reasoning left out": "the chat template leaves out the reasoning of trained answers; set model.chat_template to a "
    "version that writes it, or put it into the content",
    "tools left out": "the chat template does not write the tools, so that the model is not told of them; set "
    "model.chat_template to a version that does",
    "system folded": "the chat template takes no system message: it is put in front of the first user's text, as "
    "`ftjax generate` and `ftjax chat` do; other programs have to do the same (data.fold_system: false refuses such rows)",
    "control tokens split": "a user, a tool or the system spells control tokens (such as <|im_end|>): they are read as "
    "plain text; data.special_tokens_in_text: encode makes them tokens, error refuses them",
    "control tokens split in answers": "an answer spells tokens that begin or end turns: they are read as plain text; "
    "data.special_tokens_in_text: encode makes them tokens, error refuses them",
    "control tokens encoded": "a message spells control tokens, which are tokens (data.special_tokens_in_text: encode), "
    "so that a text may end its own turn",
    "unknown tokens": "the answer holds characters that the tokenizer does not know: the model learns to write its "
    "unknown token there. Take a tokenizer (and model) that knows them, or leave such rows out",
}  # fmt: skip


def warnings_of(report: DataReport, broken: list[str], masked: list[str], encoding: RowEncoding = ANSWERS) -> list[str]:
    """Return the warnings that follow from the counts."""
    notes, found = report.notes, []
    several = encoding.sequences > 1  # notes count documents
    what = "documents" if several else "rows"
    if report.dropped[BROKEN]:
        more = report.dropped[BROKEN] - len(broken)
        rest = f" and {more:,} more" if more else ""
        found.append(f"{report.dropped[BROKEN]:,} broken rows were skipped: {' | '.join(broken)}{rest}")
    if report.dropped[UNWANTED]:
        found.append(
            f"{report.dropped[UNWANTED]:,} rows have label false (an unpaired preference, as for KTO): their completions are "
            "not wanted, and this objective has no use for them (objective.name: kto has); data.format: prompt_completion "
            "trains them as if they were"
        )
    if several and report.dropped[LONG]:
        found.append(
            f"data.max_length {report.max_length:,} must hold all documents of a row of data, and those of "
            f"{report.dropped[LONG]:,} examples have up to {notes['longest']:,} tokens: raise it, or shorten them with "
            "data.truncation"
        )
    if report.dropped[MASKED]:
        found.append(
            f"{report.dropped[MASKED]:,} rows have no trained token{' in one of their documents' if several else ''} (left "
            f"within max_length) and are dropped, such as {', '.join(masked)}"
        )
    if notes["no end trained"]:
        found.append(
            f"in {notes['no end trained']:,} {what} no EOS or end of turn is trained: the model does not learn to stop there"
        )
    if notes["end outside the marks"]:
        found.append(
            f"the chat template's {{% generation %}} marks leave out {notes['end outside the marks']:,} ends of turn; they are "
            "trained all the same, as the model must learn to stop"
        )
    if notes["end added"]:
        found.append(f"the chat template writes no end after the last answer; EOS is added in {notes['end added']:,} {what}")
    if notes["found turn by turn"]:
        found.append(
            "the chat template has no {% generation %} marks: what the assistant wrote was found by rendering turn by turn, "
            "and each turn was checked to be a prefix of the whole"
        )
    found += [f"in {notes[name]:,} {what} {said}" for name, said in COUNTED.items() if notes[name]]
    for name, other in (("wanted", "unwanted"), ("unwanted", "wanted")):
        if notes[name] and not notes[other]:
            found.append(
                f"all {notes[name]:,} answers are {name}: there is nothing to tell them from, so the model learns little but "
                f"to make every answer {'likely' if name == 'wanted' else 'unlikely'}. Add {other} answers (label "
                f"{str(other == 'wanted').lower()})"
            )
    if notes["partner shortened"]:
        found.append(
            f"in {notes['partner shortened']:,} rows the document for the KL divergence loses its end, to fit into a row of "
            "data.max_length beside the answer"
        )
    if notes["BOS added"]:
        found.append(
            "the chat template writes no BOS and the tokenizer puts one before every text: ftjax puts one before each "
            "conversation; write {{ bos_token }} into model.chat_template so that other programs do too"
        )
    if notes["joined without a space"]:
        advice = (
            "begin the answers with one"
            if encoding.rejected
            else "write data.completion_template: ' {completion}' or a data.template"
        )
        found.append(
            f"in {notes['joined without a space']:,} {what} the completion follows the prompt without white space between "
            f"them; if that is not meant, {advice}"
        )
    return found
