"""The demo: documents, the comparison on a tiny model, the report, and what it refuses."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import icecache
import pytest
import torch
from icecache.bench.decoder import Decoder
from icecache.bench.quality import decode_freely
from icecache.cli import app
from icecache.demo.document import make_document
from icecache.demo.methods import compared
from icecache.demo.picture import write_picture
from icecache.demo.report import Facts, write_report
from icecache.demo.run import STEPS, Question, Row, run_demo
from icecache.demo.trace import QuestionTrace, trace_question
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner


class CharTokenizer:
    """One token per byte: what the demo needs of a tokenizer, without a vocabulary file."""

    eos_token_id = 0

    def __call__(self, text: str, **arguments: Any) -> Any:
        return type("Encoding", (), {"input_ids": list(text.encode("latin-1", "replace"))})

    def decode(self, ids: Any, **arguments: Any) -> str:
        return bytes(int(i) for i in ids).decode("latin-1")

    def apply_chat_template(self, messages: list[dict[str, str]], **arguments: Any) -> str:
        return f"<user>{messages[0]['content']}</user>"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
    )
    made: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return made


def test_document_hides_needles_where_it_says() -> None:
    tokenizer = CharTokenizer()
    document = make_document(tokenizer, None, 2000, seed=3)
    assert len(document.needles) == 3
    assert 2000 <= document.tokens.shape[0] <= 2600
    ends = [0]
    for needle in document.needles:
        text = tokenizer.decode(document.tokens[needle.begin : needle.end])
        assert f"{needle.key} is: {needle.answer}." in text
        assert needle.begin > ends[-1]
        ends.append(needle.end)
        assert needle.key in tokenizer.decode(needle.question)
        assert needle.answer not in tokenizer.decode(needle.question)
    again = make_document(tokenizer, None, 2000, seed=3)
    assert torch.equal(again.tokens, document.tokens)


def test_document_of_the_user_is_taken_whole(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time.\n" * 60)
    document = make_document(CharTokenizer(), path, None, seed=0)
    assert CharTokenizer().decode(document.tokens).count("Once upon a time.") == 60
    assert document.name == "story.txt"


def test_too_short_a_document_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a")

    class Terse(CharTokenizer):
        def __call__(self, text: str, **arguments: Any) -> Any:
            return type("Encoding", (), {"input_ids": list(text.encode()[:9])})

    with pytest.raises(icecache.InvalidArgument, match="at least 400 tokens"):
        make_document(Terse(), path, None, seed=0)


@pytest.fixture(scope="module")
def outcome(model: LlamaForCausalLM) -> tuple[Any, list[Row], list[QuestionTrace]]:
    tokenizer = CharTokenizer()
    decoder = Decoder(model)
    document = make_document(tokenizer, None, 700, seed=1)
    traces: list[QuestionTrace] = []
    calls: list[tuple[int, int]] = []

    def on_question(number: int, question: Question) -> None:
        traces.append(trace_question(decoder, tokenizer, question, 128))

    rows = run_demo(
        decoder,
        tokenizer,
        document,
        compared((2000, 128), 128),
        lambda label, done, total: calls.append((done, total)),
        on_question,
    )
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    return document, rows, traces


def test_rows_compare_with_full_attention(
    outcome: tuple[Any, list[Row], list[QuestionTrace]],
) -> None:
    _, rows, _ = outcome
    full, lossless, whole, ours, paper, quest, streaming = rows
    assert full.kl == 0 and full.mass == 1
    # A budget beyond the document is full attention, word by word.
    assert whole.kl < 1e-6 and whole.agreement == 1 and whole.answers == full.answers
    assert lossless.kl < 1e-6 and lossless.agreement == 1 and lossless.answers == full.answers
    assert lossless.mass == 1
    assert 0 < ours.kl < streaming.kl
    assert ours.mass is not None and 0 < ours.mass < 1
    assert paper.mass is None and quest.mass is None and streaming.mass is None
    for row in rows:
        assert len(row.answers) == len(row.found) == 3
        assert row.tokens_per_second > 0
        assert row.bytes_per_step > 0 and row.device_bytes > 0
    assert ours.bytes_per_step < full.bytes_per_step


def test_answers_are_what_each_method_writes_by_itself(model: LlamaForCausalLM) -> None:
    tokenizer, decoder = CharTokenizer(), Decoder(model)
    document = make_document(tokenizer, None, 700, seed=1)
    methods, agreed = compared((2000, 64), 64), []

    def check(number: int, question: Question) -> None:
        for method in methods:
            session = method.open(decoder, question.prefill)
            tokens = decode_freely(decoder, question.prefill, [session])[0]
            written[method.name, method.budget].append(tokenizer.decode(tokens).strip())
            agreed.append(torch.equal(tokens[:-1], question.prefill.continuation[:STEPS]))

    written: dict[tuple[str, int], list[str]] = {(one.name, one.budget): [] for one in methods}
    rows = run_demo(decoder, tokenizer, document, methods, lambda *_: None, check)
    made = {(row.name, row.budget): row.answers for row in rows}
    assert {key: made[key] for key in written} == written
    assert {True, False} == set(agreed)


def test_traces_hold_what_was_attended(
    outcome: tuple[Any, list[Row], list[QuestionTrace]],
) -> None:
    _, _, traces = outcome
    assert len(traces) == 3
    for trace in traces:
        for head in trace.maps:
            positions = sorted(p for _, *page in head.pages for p in page)
            assert positions == list(range(positions[0], positions[-1] + 1))
            assert set(head.picked) <= set(positions)
            sink, window = positions[0], len(b64decode(head.attention)) - positions[-1] - 1
            assert sink == 4 and window >= 32  # and what waits to be sealed
            assert len(head.picked) == 128 - 4 - 32
            assert sum(head.exact) == pytest.approx(1 - head.mass, abs=1e-4)
            assert sum(head.summarised) == pytest.approx(1 - head.mass, abs=0.1)


FACTS = Facts("tiny", 2, 2, 128, "a machine", {})


def test_the_picture_is_drawn(
    outcome: tuple[Any, list[Row], list[QuestionTrace]], tmp_path: Path
) -> None:
    document, rows, traces = outcome
    path = tmp_path / "demo.svg"
    write_picture(path, FACTS, document, rows, traces[0])
    drawn = path.read_text(encoding="utf-8")
    assert drawn.startswith("<?xml") and f"asked for: {traces[0].answer}" in drawn
    for row in rows:
        assert f"<!-- {row.name} -->" in drawn
    with pytest.raises(icecache.Error, match="cannot be written"):
        write_picture(tmp_path / "demo.none", FACTS, document, rows, traces[0])


class Page(HTMLParser):
    """Collects the page's script and everything it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.script = ""
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_script = tag == "script"
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.script += data


def test_report_is_one_self_contained_page(
    outcome: tuple[Any, list[Row], list[QuestionTrace]], tmp_path: Path
) -> None:
    document, rows, traces = outcome
    tokens = ["</script><b>&<!--<script>", "\u2028\u2029\ud800"]
    tokens += [chr(int(t)) for t in document.tokens[2:]]
    rows = [replace(rows[0], answers=["<!--<script>", "]]>", "</SCRIPT\n>"]), *rows[1:]]
    facts = Facts("tiny", 2, 2, 128, "a machine", icecache.Config().to_dict())
    path = tmp_path / "report.html"
    write_report(path, facts, document, tokens, rows, traces)
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.loads == []
    data = re.search(r"const DATA = (.*);\n", page.script)
    assert data is not None
    # What a script's end, and what hides it, begins with (HTML, 13.2.5.15 and on).
    assert "<" not in data.group(1) and data.group(1).isascii()
    read = json.loads(data.group(1))
    assert read["document"]["tokens"] == tokens
    assert [row["name"] for row in read["rows"]] == [row.name for row in rows]
    assert len(read["questions"][0]["steps"]) <= STEPS


def test_unwritable_report_is_an_error(
    outcome: tuple[Any, list[Row], list[QuestionTrace]], tmp_path: Path
) -> None:
    document, rows, traces = outcome
    facts = Facts("tiny", 2, 2, 128, "a machine", {})
    with pytest.raises(icecache.Error, match="cannot be written"):
        write_report(tmp_path, facts, document, [], rows, traces)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--report", "."],
            "--report must be a file that can be written, got ., which is a folder",
        ),
        (["--document", "absent.txt"], "absent.txt cannot be read"),
        (["--model", "absent"], 'must be a local folder or "smollm2", got absent'),
        (["--report", "absent/report.html"], "existing folder"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 2
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert len(lines) == 1 and message in lines[0], result.output


@pytest.mark.model
def test_document_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 1200)
    result = CliRunner().invoke(
        app, ["demo", "--document", str(path), "--report", str(tmp_path / "report.html")]
    )
    assert result.exit_code == 2
    assert "context of 8192 tokens" in result.output
    assert not (tmp_path / "report.html").exists()
