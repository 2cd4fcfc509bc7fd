"""Runs under a Python with transformers 4.57 and PEFT 0.13, and reports what they read from folders. Arguments: a list of
folders and of texts, as JSON, and the file for the answers."""

import json
import sys
from pathlib import Path

import torch
from older_config import write_config
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer


def read(folder: str, ids: list, texts: list[str], adapter: str | None = None, config: dict | None = None) -> dict:
    """Args: config: a model_type and its values, to write as config.json first."""
    answer = {}
    if config:
        write_config(folder, **config)
    if ids:
        of_text = type(AutoConfig.from_pretrained(folder)) in AutoModelForCausalLM._model_mapping
        auto = AutoModelForCausalLM if of_text else AutoModelForImageTextToText
        model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        if adapter:
            model = PeftModel.from_pretrained(model, adapter).eval()
        with torch.no_grad():
            answer["logits"] = model(torch.tensor(ids), use_cache=False).logits[:, -len(ids[0]) :].tolist()
    if texts:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        answer["ids"] = [tokenizer(text).input_ids for text in texts]
        answer["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        if tokenizer.chat_template:
            answer["chat"] = tokenizer.apply_chat_template([{"role": "user", "content": texts[0]}], tokenize=False)
    return answer


def main(asked: str, out: str) -> None:
    answers = []
    for one in json.loads(Path(asked).read_text()):
        try:
            answers.append(read(**one))
        except Exception as error:  # the test lists those that are refused
            answers.append({"error": f"{type(error).__name__}: {error}"})
    Path(out).write_text(json.dumps(answers))


main(*sys.argv[1:])
