"""`ftjax teach` with a server: what it is asked, what is written, and what is refused."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pytest
from reward_runs import settings
from tiny_tokenizer import make_tokenizer

from ftjax.config import Config
from ftjax.data.pipeline import load_splits
from ftjax.data.predictions import facts_of
from ftjax.errors import UserError
from ftjax.objectives import encoding_of
from ftjax.rl.teach import teach
from ftjax.train.teach import with_predictions

TOKENIZER, WORDS = make_tokenizer(), 90


def predicted(prefix: list[int]) -> np.ndarray:
    """The log-probabilities of this teacher after some tokens."""
    logits = np.random.default_rng(prefix).normal(size=WORDS)
    return logits - np.log(np.exp(logits).sum())


class Teacher(BaseHTTPRequestHandler):
    shift, most, ids = 0, 20, True  # of the texts of tokens; likely tokens that are named; whether by their ids

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        ids, tops = asked["prompt"], [None]
        by_id = self.ids and asked["return_tokens_as_token_ids"]
        for at in range(1, len(ids) + 1):  # one more, for the token that is generated
            row = predicted(ids[:at])
            best = np.argsort(-row)[: min(self.most, asked["logprobs"])].tolist()
            named = {*best, ids[at]} if at < len(ids) else {*best}  # vLLM names the token itself, too
            tops.append({f"token_id:{one}" if by_id else TOKENIZER.decode([one]): row[one] for one in named})
        texts = [f"token_id:{one}" if by_id else TOKENIZER.decode([(one + self.shift) % WORDS]) for one in [*ids, 5]]
        body = json.dumps({"choices": [{"text": "", "logprobs": {"tokens": texts, "top_logprobs": tops}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(**how) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Taught", (Teacher,), how))
        server.asked = []
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def config(model, out, server, **objective) -> Config:
    (out / "rows.jsonl").write_text("".join(json.dumps({"prompt": one, "completion": f"{one}{one}"}) + "\n" for one in "abc"))
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    own = {
        "name": "distill", "teacher_model_server_url": url, "teacher_model_name_or_path": "large", "loss_top_k": 4,
        "teacher_logprobs": str(out / "predictions"), **objective,
    }  # fmt: skip
    return Config.model_validate({**settings(model, out, out, data={"train": str(out / "rows.jsonl")}), "objective": own})


def test_a_server_scores_the_documents(model, serve, tmp_path):
    server = serve()
    given = config(model, tmp_path, server)
    [path] = teach(given)
    assert {(one["model"], one["echo"], one["logprobs"], one["max_tokens"]) for one in server.asked} == {("large", True, 4, 1)}
    found, facts = pa.ipc.open_file(path).read_all().to_pylist(), facts_of(path)
    assert facts["teacher"]["model"] == "large" and facts["top_k"] == 4 and len(found) == 9
    split, _ = load_splits(given.data, TOKENIZER, seed=given.training.seed, encoding=encoding_of(given))
    for row in found:
        tokens = split.documents.document(row["document"]).tokens.tolist()
        want = predicted(tokens[: row["position"]])
        assert tokens[row["position"]] == row["token"] and row["ids"] == np.argsort(-want)[:4].tolist()
        np.testing.assert_allclose(row["logprobs"], np.sort(want)[::-1][:4], rtol=1e-6)
        assert row["rest"] == pytest.approx(math.log(np.exp(np.sort(want)[:-4]).sum()), rel=1e-5)
    train, _ = with_predictions(given, (split, None))
    batch = next(train.batches(2, seed=0, shuffle=True, epochs=1))
    assert batch["labels"].shape == (2, 16 * 9) and (batch["labels"].reshape(2, 16, 9)[batch["weights"] == 0] == 0).all()
    count = len(server.asked)
    assert teach(given) == [path] and len(server.asked) == count


def test_what_a_server_cannot_give_is_refused(model, serve, tmp_path):
    with pytest.raises(UserError, match=r"it names [23] likely tokens, and objective.loss_top_k is 4"):
        teach(config(model, tmp_path, serve(most=2)))
    with pytest.raises(UserError, match="it names likely tokens by their texts"):
        teach(config(model, tmp_path, serve(ids=False)))
    with pytest.raises(UserError, match="another tokenizer than the student: '<s>' is '</s>' there"):
        teach(config(model, tmp_path, serve(shift=1)))
    assert not (tmp_path / "predictions" / "train.arrow").exists()
    with pytest.raises(ValueError, match="at temperature 1"):
        config(model, tmp_path, serve(), temperature=2.0)
