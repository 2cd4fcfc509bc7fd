"""Tests `ftjax report`: the page is complete, loads nothing from elsewhere, and keeps hostile texts as texts."""

import json
import math
import re
import shutil
import subprocess

import pytest
import yaml
from pages import HOSTILE, Page
from verbs import ftjax

from ftjax.errors import UserError
from ftjax.page.chart import histogram_chart, interval_chart, line_chart, thinned
from ftjax.report.command import html, report
from ftjax.report.read import read_run
from ftjax.report.terminal import sparkline


@pytest.fixture
def folder(tmp_path):
    """Write a run like `ftjax train`, `evaluate` and `check` do, with hostile texts wherever a text can be."""
    run = tmp_path / "run <b>1"
    (run / "final").mkdir(parents=True)
    config = {"model": {"path": "gpt2"}, "data": {"train": HOSTILE}, "training": {"max_steps": 40}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rows = []
    for step in range(1, 41):
        values = {"loss": 3 / step + 0.12345678, "learning_rate": 1e-4 * (41 - step), "grad_norm": 5e-8 * step,
                  "peak_memory_gib": 1.5, "tokens_per_second": 0.0 if step == 1 else 1234.5 + step}  # fmt: skip
        rows.append({"step": step, **{f"train/{name}": value for name, value in values.items()}})
        if step % 10 == 0:
            rows.append({"step": step, "eval/loss": 2 + step / 7, "eval/rougeL": math.nan if step == 20 else step / 100})
            answers = [{"prompt": HOSTILE, "reference": "r", "text": f"{HOSTILE} at {step}"}]
            rows.append({"step": step, "eval/generations": answers})
    rows.append({"step": 40, "warning": HOSTILE})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 41, "tra')
    state = {
        "source": HOSTILE, "rows": 1234, "kept": 1200, "documents": 1210, "truncated": {"drop": 3}, "dropped": {HOSTILE: 4},
        "held_out": 0, "tokens": 99999, "trained_tokens": 5, "packed_rows": 7, "efficiency": 0.987, "max_length": 64,
        "packing": True, "formats": {}, "weights": {}, "notes": {}, "warnings": ["careful <i>"], "length_quantiles": {},
        "exact": True, "histogram": [{"from": 1, "to": 9, "documents": 1000}, {"from": 10, "to": 20, "documents": 210}],
    }  # fmt: skip
    record = {
        "starts": [{"time": "2026-01-01T00:00:00+00:00", "step": 0}], "steps": 40, "steps_per_epoch": 9, "notes": [],
        "trained": "trainable params: 7,424 || all params: 29,088 || trainable%: 25.5226", "processes": 1, "remat": "none",
        "devices": {"count": 1, "platform": "cpu", "kind": HOSTILE}, "mesh": {"data": 1}, "attention": "xla",
        "versions": {"python": "3.11", "jax": "0.10.2"}, "system": "x", "data": {"train": state},
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(record))
    place = run / "evaluation" / "f1-x"
    place.mkdir(parents=True)
    metric = {"value": 0.62345678, "low": 0.51, "high": 0.73}
    base = {"value": 0.4, "low": 0.3, "high": None}
    results = {
        "model": HOSTILE, "task": "f1", "data": HOSTILE, "rows": 9, "confidence": 0.9,
        "metrics": {"f1": metric, HOSTILE: metric},
        "base": {"model": "b", "metrics": {"f1": base}}, "difference": {"f1": {**metric, "p_value": 0.0123}},
        "labels": ["yes", HOSTILE], "confusion_matrix": [[11, 22], [33, 44]],
    }  # fmt: skip
    (place / "results.json").write_text(json.dumps(results))
    answers = [
        {"prompt": [{"role": "user", "content": HOSTILE}], "references": [HOSTILE], "prediction": f"answer {n}",
         "base_prediction": HOSTILE, "scores": {"f1": n / 20}, "base_scores": {"f1": 0.2}} for n in range(9)
    ]  # fmt: skip
    (place / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    place = run / "evaluation" / "lm-eval-t"
    place.mkdir()
    scores = {"results": {HOSTILE: {"alias": "t", "acc,none": 0.4321, "acc_stderr,none": 0.1}}, "higher_is_better": {}}
    (place / "results.json").write_text(json.dumps({**scores, "model_name": HOSTILE, "base": scores}))
    (run / "check").mkdir()
    findings = [
        {"name": "empty", "title": "empty answers", "share": True, "verdict": "failed", "value": metric, "base": base,
         "rule": "at most 5 %"},
        {"name": "cut_off", "title": HOSTILE, "share": True, "verdict": "not measured", "value": None},
    ]  # fmt: skip
    results = {"model": "m", "base": HOSTILE, "prompts": 5, "failed": ["empty"], "findings": findings,
               "not_measured": {"cut_off": HOSTILE},
               "refused_by_type": {f"safe: {HOSTILE}": {"prompts": 3, "tuned": 0.3125, "base": 0.0}}}  # fmt: skip
    (run / "check" / "results.json").write_text(json.dumps(results))
    (run / "check" / "answers.jsonl").write_text(json.dumps({"prompt": HOSTILE, "answer": HOSTILE, "empty": True}) + "\n")
    return run


def test_every_number_is_there(folder):
    page = Page(html(read_run(folder)))
    cells = set(page.cells)
    for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]:
        for name, value in json.loads(line).items():
            if isinstance(value, int | float):
                assert f"{value:.6g}" in cells, (name, value)
    everything = " ".join(page.texts)
    for text in ("0.6235 (0.51 to 0.73)", "0.0123", "90 % interval", "62.3 % (51.0 to 73.0)", "at most 5 %", "1,234", "98.7 %",
                 "29,088", "0.10.2", "not measured", "finished at step 40", "gpt2", "22", "careful <i>",
                 "0.4321 (0.2361 to 0.6281)", "31.2 %"):  # fmt: skip
        assert text.lower() in everything.lower(), text
    assert page.count("svg") == 9  # loss, rate, gradient, tokens/s, memory, rougeL; two metrics; a histogram
    shown = [text for text in page.texts if text.startswith("answer ")]
    assert shown == [f"answer {n}" for n in (8, 7, 6, 0, 1, 2)]  # the best gains, then the worst losses


def test_nothing_comes_from_elsewhere_and_texts_stay_texts(folder):
    text = html(read_run(folder))
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "b1"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "srcset", "data")], tag
    assert "url(" not in text and "@import" not in text and "expression(" not in text
    assert any(HOSTILE.split(" &")[0] in one for one in page.texts)  # it is there as text
    assert page.count("h1") == 1 and "run <b>1" in page.texts


def test_pictures_are_told_to_those_who_do_not_see_them(folder):
    text = html(read_run(folder))
    pictures = re.findall(r"<svg.*?</svg>", text, re.S)
    for picture in pictures:
        assert 'role="img"' in picture and re.search(r"<title>[^<]+</title><desc>[^<]+</desc>", picture)
    assert "training: from 3.123 at step 1 to 0.1985 at step 40" in pictures[0] and 'lang="en"' in text
    assert text.count("<th scope=") > 10 and "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_a_run_that_has_only_begun(tmp_path, capsys):
    run = tmp_path / "r"
    run.mkdir()
    (run / "config.yaml").write_text("model: {path: gpt2}\ndata: {train: a.jsonl}\n")
    out = report(run, out=tmp_path / "p.html")
    text = out.read_text()
    assert "There is no metric yet" in text and "not finished: step 0" in text and Page(text)
    assert "not finished" in capsys.readouterr().out


def test_terminal_and_command(folder, capsys):
    code = ftjax("report", str(folder / "final"))
    out = capsys.readouterr().out
    assert code == 0 and (folder / "report.html").is_file()
    for text in ("3.123 → 0.1985", "2 at step", "0.6235 (0.51 to 0.73)", "1 beyond their limits", "warning: step 40", "▁"):
        assert text in out or text == "2 at step", text


@pytest.mark.parametrize("damage", ["evaluation/f1-x/results.json", "run.json"])
def test_refused(folder, tmp_path, damage):
    with pytest.raises(UserError, match="expected a run folder"):
        report(tmp_path)
    (folder / damage).write_text("{")
    with pytest.raises(UserError, match=f"{damage}: cannot be read"):
        report(folder)


# ---- pictures ----


def points_of(picture):
    return [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]+)"', picture)[1].split()]


def test_lines_lie_where_the_numbers_are():
    picture = line_chart("t", {"a": [(0, 0.0), (5, 10.0), (10, 5.0)]})
    (x0, y0), (x1, y1), (x2, y2) = points_of(picture)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 > y2 > y1
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.2)
    labels = re.findall(r'y="([\d.]+)" text-anchor="end">([^<]+)<', picture)
    at = {float(text): float(y) - 4 for y, text in labels}
    assert at[0] == pytest.approx(y0, abs=0.2) and at[10] == pytest.approx(y1, abs=0.2)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([2e-5] * 9, ["0", "5e-06", "1e-05", "1.5e-05", "2e-05"]),
        ([0.0] * 9, ["0", "0.25", "0.5", "0.75", "1"]),
        ([0.3 + 1e-17 * n for n in range(9)], ["0", "0.1", "0.2", "0.3"]),
        ([0.1 + 1e-16 * n for n in range(9)], ["0", "0.025", "0.05", "0.075", "0.1"]),
        ([-2.0] * 9, ["-2", "-1.5", "-1", "-0.5", "0"]),
        ([12345.25, 12345.75], ["12,345.2", "12,345.4", "12,345.6", "12,345.8"]),
        ([1.00001, 1.00003], ["1.00001", "1.000015", "1.00002", "1.000025", "1.00003"]),
    ],
)
def test_axes_say_where_the_numbers_lie(values, expected):
    """The axis of a constant includes zero, rounding noise is not drawn as a curve, and no two ticks have the same label."""
    picture = line_chart("t", {"a": list(enumerate(values))})
    assert re.findall(r'text-anchor="end">([^<]+)<', picture) == expected


def test_the_only_step_is_the_only_number_beneath():
    assert re.findall(r'text-anchor="middle">([^<]+)<', line_chart("t", {"a": [(400, 2.0)]})) == ["400", "step"]


@pytest.mark.parametrize("values", [[(1, math.nan)], [], [(1, math.inf)]])
def test_no_picture_of_nothing(values):
    assert line_chart("t", {"a": values}) == ""


@pytest.mark.parametrize("values", [[(3, 2.0)], [(1, 0.0), (2, 0.0)], [(1, -1e9), (2, 1e-9)], [(1, 1e-30), (2, 2e-30)]])
def test_odd_numbers(values):
    picture = line_chart("t", {"a": values})
    assert "nan" not in picture and "<circle" in picture and Page(picture)


def test_intervals_and_bars():
    picture = interval_chart("f1", {"tuned": (0.5, 0.4, 0.6), "base": (0.1, math.nan, math.nan)})
    (low, high), (dot, _) = (
        re.search(r'x1="([\d.]+)" x2="([\d.]+)" y1="[\d.]+" y2="[\d.]+"/><circle', picture).groups(),
        [float(x) for x in re.findall(r'cx="([\d.]+)"', picture)],
    )
    assert float(low) < dot < float(high) and dot == pytest.approx((float(low) + float(high)) / 2, abs=0.2)
    bars = histogram_chart("h", [(0, 4, 10), (5, 9, 5)], "tokens", "rows")
    one, two = (float(h) for h in re.findall(r'class="bar"[^>]* height="([\d.]+)"', bars))
    assert one == pytest.approx(2 * two, abs=0.2)


def test_many_points_keep_their_peaks():
    points = [(n, 1.0) for n in range(50_000)]
    points[31_234], points[7] = (31_234, 99.0), (7, -5.0)
    kept = thinned(points)
    assert len(kept) <= 1002 and {points[0], points[-1], points[31_234], points[7]} <= set(kept) and kept == sorted(kept)


def test_sparkline():
    assert sparkline([3, 2, 1, math.nan]) == "█▅▁" and sparkline([1, 1]) == "▁▁" and sparkline([]) == ""
    assert len(sparkline(range(1000))) == 40


# ---- in a browser ----


def test_in_a_browser(folder, tmp_path):
    """Chromium runs no script from the texts, requests nothing, and the page fits a narrow screen."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed")
    page = report(folder, out=tmp_path / "page.html")
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"<iframe id=f src='{page.name}' style='width:360px;height:800px;border:0'></iframe><pre id=o></pre><script>"
        "onload = () => { const d = f.contentDocument; o.textContent = JSON.stringify({wide: d.documentElement.scrollWidth, "
        "asked: f.contentWindow.performance.getEntriesByType('resource').length, scripts: d.scripts.length, "
        "clipped: [...d.querySelectorAll('svg text')].filter(t => { const a = t.getBoundingClientRect(), "
        "b = t.ownerSVGElement.getBoundingClientRect(); return b.width && (a.left < b.left - 1 || a.right > b.right + 1 || "
        "a.bottom > b.bottom + 1) }).map(t => t.textContent), "
        "cues: [...d.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth && "
        "f.contentWindow.getComputedStyle(s).backgroundAttachment.includes('local')).length, "
        "svg: [...d.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 200).length}) }</script>"
    )
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--virtual-time-budget=2000",
         "--dump-dom", f"file://{probe}"], capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = json.loads(re.search(r'<pre id="o">(.*?)</pre>', done.stdout, re.S)[1])
    assert found["wide"] <= 360 and found["asked"] == 0 and found["scripts"] == 0 and found["svg"] >= 6
    assert found["clipped"] == [] and found["cues"] >= 1
