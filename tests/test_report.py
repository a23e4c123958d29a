"""The page of records: its numbers, its links, and what it does not do."""

from __future__ import annotations

import copy
import html.parser
import json
import re
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import report  # noqa: E402

from vblora.io import read_json  # noqa: E402

GLUE = ROOT / "results" / "glue_minilm"
NAMES = ("minilm_cola_vblora_qv_seed0", "minilm_cola_vblora_qv_seed1", "minilm_cola_vblora_qv_seed2")
HOSTILE = "<script>alert(1)</script><img src=https://example.org/x onerror=alert(2)>"


class Page(html.parser.HTMLParser):
    """What a page holds: rows of cells under the headings before them, links, places, and all that could be fetched."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.links, self.ids, self.tags, self.sources, self.heading = [], [], [], [], [], ""
        self._cell = self._in_heading = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        self.sources += [
            v for n, v in attributes if n in ("src", "href", "xlink:href", "srcset", "data") and tag != "a"
        ]
        assert not [name for name in found if name.startswith("on")]
        if tag == "tr":
            self.rows.append((self.heading, []))
        elif tag in ("td", "th"):
            self._cell = ""
        elif tag in ("h3", "h4"):
            self._in_heading, self.heading = True, ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1][1].append(self._cell.strip())
            self._cell = None
        self._in_heading = self._in_heading and tag not in ("h3", "h4")

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data
        if self._in_heading:
            self.heading += data

    def row(self, heading, name):
        """The cells of a row by the titles of its table."""
        titles = next(cells for place, cells in self.rows if heading in place)
        cells = next(cells for place, cells in self.rows if heading in place and cells[0] == name)
        return list(zip(titles, cells, strict=True))


def made(*arguments):
    report.main([*map(str, arguments)])
    text = Path(arguments[-1]).read_text(encoding="utf-8")
    return Page(text), text


@pytest.fixture
def records(tmp_path):
    """Three seeds of MiniLM with a log of selections, a row of the paper's, and one with hostile names."""
    folder = tmp_path / "some records"
    (folder / "selections").mkdir(parents=True)
    for name in NAMES:
        shutil.copy(GLUE / f"{name}.json", folder)
    shutil.copy(GLUE / "selections" / f"{NAMES[0]}.safetensors", folder / "selections")
    record = read_json(GLUE / f"{NAMES[0]}.json")
    row = copy.deepcopy(record) | {"row": "roberta_large/cola/vblora_qv", "model": "roberta-large"}
    row["scores"]["best"]["matthews_correlation"] = 0.6712
    (folder / "paper.json").write_text(json.dumps(row))
    hostile = copy.deepcopy(record) | {"row": None, "method": HOSTILE, "model": HOSTILE}
    hostile["overrides"] = {HOSTILE: HOSTILE, "hub_token": "hf_secret", "tau": "$\\frac{"}
    hostile["scores"]["metric"] = "$\\frac{"
    for epoch in (*hostile["scores"]["epochs"], hostile["scores"]["last"], hostile["scores"]["best"]):
        epoch["$\\frac{"] = epoch.pop("matthews_correlation")
    (folder / "hostile.json").write_text(json.dumps(hostile))
    return folder


def test_the_numbers_are_the_records_with_the_papers_beside(records, tmp_path):
    page, _ = made(records, "--output", tmp_path / "pages" / "page.html")
    best = [100 * read_json(records / f"{name}.json")["scores"]["best"]["matthews_correlation"] for name in NAMES]
    ours = page.row("all-MiniLM-L6-v2, cola, 8,551 rows", "vblora_qv")
    assert ours[0][0] == "method and settings" and ours[1] == ("Matthews, best epoch", f"{sorted(best)[1]:.2f} ± 0.99")
    assert ours[3:] == [("seeds", "3"), ("stored numbers", "11,952"), ("bytes", "47,808")]
    assert page.row("roberta-large, cola", "vblora_qv")[1:4] == [
        ("Matthews, best epoch", "67.12"),
        ("paper", "68.30"),
        ("difference", "-1.18"),
    ]
    assert ("paper", "24,000") in page.row("roberta-large, cola", "vblora_qv")
    assert page.row("What was selected", "vblora_qv, seed 0")[1:4] == [
        ("bank in use, first", "1.000"),
        ("last", "0.989"),
        ("ever", "1.000"),
    ]


def test_the_papers_figures_go_by_the_row():
    """Tables 2, 3, 4 and 5, and the numbers of a model that the paper has not."""
    assert report.e2e({"row": "gpt2_large/vblora"}) == {
        **{"BLEU": 70.3, "NIST": 8.86, "METEOR": 46.7, "ROUGE-L": 72.2, "CIDEr": 2.54},
        "parameters": 130_000,
    }
    judged = {"row": "llama2_7b/vblora", "scores": {"gpt-4": {}}}
    assert report.instruct(judged) == {"turn 1, gpt-4": 5.71, "parameters": 800_000}
    assert report.mathematics({"row": "gemma_7b/lora"}) == {"GSM8K": 74.9, "MATH": 31.28, "parameters": 200e6}
    record = read_json(GLUE / "minilm_cola_vblora_qv_top1_seed0.json")
    flags = report.trial_of("roberta_large/cola/vblora_qv", "top1", {"topk": 1}, 0).row_flags()
    record |= {"row": "roberta_large/cola/vblora_qv", "settings": flags | {"topk": 1}}
    assert report.glue(record)["Matthews, best epoch"] == 66.9
    assert report.e2e({"row": "smollm2_135m/vblora"}) == report.e2e({"row": None}) == {}


def test_runs_of_other_rates_are_other_lines(tmp_path):
    """What the recipe gave counts: an earlier version's gave another rate for the same flags."""
    folder = ROOT / "results" / "recipe"
    names = [f"sentences_e3_recipe{rate}_seed{seed}.json" for rate in ("", "_rate_5e-3") for seed in range(2)]
    page, text = made(*(folder / name for name in names), "--output", tmp_path / "page.html")
    for rate, score in (("0.004", "77.56 ± 2.79"), ("0.005", "79.74 ± 3.00")):
        assert page.row("cola, 2,000 rows", f"vblora, learning_rate_vector_bank {rate}")[1][1] == score
        assert f"--learning_rate_vector_bank {rate} " in text


def test_a_run_on_anothers_bank_is_another_line(tmp_path):
    folder = ROOT / "results" / "shared_bank_minilm"
    page, text = made(folder, "--output", tmp_path / "page.html")
    for name, score in (("vblora_all", "77.45"), ("vblora_all, bank_from FOLDER", "72.06")):
        assert page.row("mrpc, 3,668 rows", name)[1:4:2] == [("accuracy, best epoch", score), ("seeds", "1")]
    assert "--row minilm/mrpc/vblora_all --bank_from FOLDER --seed 0" in text


def test_no_line_of_the_results_has_a_seed_twice():
    """It would be of runs that differ in more than their seed."""
    everything = report.found.read([report.RESULTS], report.PAPERS)
    assert not everything.problems and len(everything.runs) > 170
    for table in everything.tables:
        for line in table.lines:
            seeds = [run.seed for run in line.runs]
            assert len(seeds) == len(set(seeds)), (table.folder, line.name)
        assert len({line.name for line in table.lines}) == len(table.lines), table.folder


def test_every_number_leads_to_its_record_and_command(records, tmp_path):
    target = tmp_path / "pages" / "page.html"
    page, text = made(records, "--output", target)
    own = [link[1:] for link in page.links if link.startswith("#")]
    assert len(page.ids) == len(set(page.ids)) and set(own) <= set(page.ids)
    files = [link for link in page.links if not link.startswith("#")]
    assert all((target.parent / urllib.parse.unquote(link)).is_file() for link in files)
    assert sum(link.endswith(".json") for link in files) == 5
    assert "<code>python NLU/run_glue.py --row minilm/cola/vblora_qv --seed 2</code>" in text


def test_a_command_makes_the_run_of_its_record():
    """For a row with changes, and for a run that has no row: the settings that decide the result come out the same."""
    sys.path.insert(0, str(ROOT / "NLU"))
    import run_glue
    from vblora_experiments.report.kinds import KINDS, command_of

    for name in ("glue_minilm/minilm_cola_vblora_qv_top6_seed0", "recipe/sentences_e3_recipe_k2_seed1"):
        record = read_json(ROOT / "results" / f"{name}.json")
        words = command_of(record, KINDS["glue"]).split()
        settings = run_glue.read([*words[2:], "--use_cpu", "true"])
        glue, method, training = run_glue.parts(settings)
        plan = record["settings"]
        assert training.seed == record["seed"] and method.topk == plan["topk"] and glue.task == plan["task"]
        assert training.num_train_epochs == plan["num_train_epochs"] and method.recipe == plan.get("recipe", False)


def test_nothing_is_fetched_or_run_and_names_are_text(records, tmp_path):
    page, text = made(records, "--output", tmp_path / "page.html")
    assert not set(page.tags) & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in page.sources)
    assert "default-src 'none'" in text and not re.search(r"url\((?!#)|@import", text)
    assert "&lt;script&gt;alert(1)" in text and "hf_secret" not in text
    assert 'name="viewport" content="width=device-width' in text and "prefers-color-scheme: dark" in text


def test_what_cannot_be_read_is_named(records, tmp_path, capsys):
    (records / "cut.json").write_text('{"experiment": "glue"')
    (records / "list.json").write_text("[1]")
    record = read_json(GLUE / f"{NAMES[0]}.json")
    record["scores"]["best"]["matthews_correlation"] = float("nan")
    (records / "nan.json").write_text(json.dumps(record))
    (records / "lacking.json").write_text(json.dumps({"experiment": "glue", "seed": 0}))
    (records / "selections" / f"{NAMES[0]}.safetensors").write_bytes(b"no log")
    (records / "speed.json").write_text(json.dumps({"benchmark": "step_time"}))
    page, text = made(records, "--output", tmp_path / "page.html")
    errors = capsys.readouterr().err
    for name in ("cut.json", "list.json", "nan.json", "lacking.json", f"{NAMES[0]}.safetensors"):
        assert name in text[text.index("Not shown") : text.index('<h2 id="folder0">')] and name in errors
    assert "step_time" in text and page.row("8,551 rows", "vblora_qv")[3] == ("seeds", "3")


def test_wrong_input_is_refused_and_the_old_page_stays(records, tmp_path, monkeypatch):
    old = tmp_path / "page.html"
    old.write_text("old")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no record of a run in"):
        report.main([str(tmp_path / "nothing"), "--output", str(old)])
    with pytest.raises(ValueError, match="no such file or folder"):
        report.main([str(tmp_path / "missing"), "--output", str(old)])
    with pytest.raises(ValueError, match=r"must end with \.html"):
        report.main([str(records), "--output", str(tmp_path / "page.json")])
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        report.main([str(records), "--output", str(old)])
    assert old.read_text() == "old" and [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_of_runs_is_read_without_its_checkpoints(records, tmp_path):
    run = tmp_path / "runs" / "one"
    (run / "last").mkdir(parents=True)
    shutil.copy(records / f"{NAMES[0]}.json", run / "record.json")
    shutil.copy(records / "selections" / f"{NAMES[0]}.safetensors", run / "selections.safetensors")
    for name in ("run.json", "last/adapter_config.json"):
        (run / name).write_text("{}")
    page, text = made(tmp_path / "runs", "--output", tmp_path / "page.html")
    assert page.row("8,551 rows", "vblora_qv")[3] == ("seeds", "1") and "What was selected" in text
    assert "adapter_config" not in text


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_has_the_width_of_the_screen(records, tmp_path, width):
    """In a browser: a wide table scrolls in its box, not the page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    made(records, "--output", tmp_path / "page.html")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe><p id="o"></p>'
        "<script>onload = () => { const page = document.getElementById('f').contentDocument.documentElement;"
        "document.getElementById('o').textContent = page.scrollWidth + '/' + page.clientWidth }</script>"
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    shown = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<p id="o">(\d+)/(\d+)</p>', shown)
    assert found is not None, shown[-500:]
    assert int(found[1]) <= int(found[2]) <= width
