"""Claims about report: one page shows all figures and what is missing, and totals are right."""

import html.parser
import importlib.metadata
import json
import math
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from calm_jax import config, errors, resolve, seal, workdir
from calm_jax.reporting import page, provenance, records, summary, tables
from calm_jax.running import accounts
from calm_jax.stages import autoencoder as autoencoder_stage
from calm_jax.stages import calm as calm_stage
from calm_jax.stages import table
from calm_jax.training import ledger

AUTOENCODER = autoencoder_stage.Run(training=config.Training(steps=40))
CALM = calm_stage.Run(training=config.Training(steps=40))
COMMON = {
  "gradient_norm": 0.5, "parameter_norm": 40.0, "update_norm": 0.01, "learning_rate": 1e-3,
  "skipped": 0.0, "skipped_in_a_row": 0.0, "tokens": 64.0, "seconds": 2.0, "data_wait_share": 0.01,
  "patches_per_second": 25.0,
}  # fmt: skip
SUMMARY_KEYS = [
  "ae_token_accuracy", "ae_patch_accuracy", "brier_1", "brier_2", "brier_3", "brier_4", "brier_lm",
  "brier_lm_stderr", "brier_lm_marginal", "conditioning_gap", "conditioning_gap_stderr",
  "context_tokens", "train_tokens_per_second", "seconds_total", "text_samples", "versions",
  "commit",
]  # fmt: skip
SAMPLES = [
  {
    "prompt": "<b>if",
    "text": " a < b & c:</pre><script>",
    "temperature": 0.5,
    "seed": 3,
    "step": 9,
  },
  {"prompt": "", "text": "caf\u00e9", "temperature": 1.0, "seed": 4, "step": 9},
]


def train_records(run: config.Run, speeds: list[float]) -> list[dict[str, Any]]:
  own = {"attraction": 3.0, "repulsion": 2.5}
  if isinstance(run, autoencoder_stage.Run):
    own = {"token_accuracy": 0.9, "cross_entropy": 0.2, "kl": 30.0, "posterior_std": 0.4}
  return [
    {"kind": "train", "step": 10 * i, "time": 0.0, "loss": 9.0 / i, "tokens_per_second": speed,
     "flops": 1e9 * i, **own, **COMMON}
    for i, speed in enumerate(speeds, start=1)
  ]  # fmt: skip


def figures(run: config.Run) -> dict[str, Any]:
  """Returns figures as of a stage's `summarize`, with the counts of the evaluator."""
  counts = {"context_tokens": 64, "blocks": 8, "tokens": 512, "seed": 0}
  if isinstance(run, autoencoder_stage.Run):
    return counts | {
      "token_accuracy": 0.998, "token_accuracy_stderr": 0.0004, "patch_accuracy": 0.99,
      "patch_accuracy_stderr": 0.001, "cross_entropy": 0.01, "cross_entropy_stderr": 0.001,
      "posterior_std": 0.5, "active_dimensions": 2, "latent_dimensions": 3,
      "posterior_std_by_dimension": [0.2, 0.9, 0.4], "kl_by_dimension": [2.0, 0.1, 1.0],
    }  # fmt: skip
  parts = {
    f"{name}_{n}": value / n
    for n in range(1, 5)
    for name, value in (("accuracy", 6.0), ("collision", 4.0), ("brier", 8.0))
  }
  stderrs = {f"brier_{n}_stderr": 0.1 for n in range(1, 5)}
  return counts | parts | stderrs | {
    "brier_lm": 3.61, "brier_lm_stderr": 0.12, "energy": 5.0, "energy_stderr": 0.1,
    "conditioning_gap": 0.7, "conditioning_gap_stderr": 0.05,
  }  # fmt: skip


def write_lines(path: pathlib.Path, values: list[dict[str, Any]]) -> None:
  path.write_text("".join(json.dumps(value) + "\n" for value in values))


TRADEOFF = [
  {
    "rule": "first", "at_limit": "prefix", "temperature": temperature, "num_candidates": n,
    "draws": draws, "accuracy": [30 + draws], "accuracy_error": [1.0],
    "collision": [30 + 2 * draws],
  }
  for temperature, n, draws in ((1.0, 1, 1.0), (0.5, 24, 12.0), (0.5, 8, 6.0))
]  # fmt: skip


def make_workdir(
  path: pathlib.Path, run: config.Run, speeds: list[float], complete: bool = True
) -> pathlib.Path:
  """Writes a workdir; unless `complete`, it has neither evaluations nor texts."""
  path.mkdir()
  text = resolve.to_json(run)
  (path / "config.json").write_text(text)
  seal.write(str(path), seal.Seal("run", "", "", (seal.of_bytes(text.encode()),)))
  reports = train_records(run, speeds)
  if complete:
    reports += [
      {"kind": "evaluation", "step": step, "time": 0.0, "flops": 1e8 * step, **figures(run)}
      for step in (20, 40)
    ]
    final = {"stage": run.stage, "step": 40, **figures(run), "data": "tokens", "store_hash": "ab"}
    if isinstance(run, calm_stage.Run):
      final |= {"samples": 8, "brier_lm_marginal": 1.25}
      write_lines(path / workdir.SAMPLES, SAMPLES)
      (path / workdir.TRADEOFF).write_text(json.dumps({"rows": TRADEOFF, "baseline": TRADEOFF[:2]}))
    (path / workdir.EVALUATION).write_text(json.dumps(final))
  write_lines(path / workdir.METRICS, reports)
  return path


@pytest.fixture
def autoencoder(tmp_path: pathlib.Path) -> pathlib.Path:
  return make_workdir(tmp_path / "autoencoder", AUTOENCODER, [10.0, 40.0, 20.0, 30.0])


@pytest.fixture
def calm(tmp_path: pathlib.Path) -> pathlib.Path:
  return make_workdir(tmp_path / "calm", CALM, [7.0, 1.0, 100.0])


def account_of(directory: pathlib.Path | str) -> records.Account:
  return accounts.read(str(directory))


def render(*directories: pathlib.Path) -> str:
  return page.render([account_of(directory) for directory in directories])


@pytest.fixture(scope="module")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> str:
  """The page of a finished autoencoder and an unfinished language model."""
  root = tmp_path_factory.mktemp("runs")
  return render(
    make_workdir(root / "autoencoder", AUTOENCODER, [10.0, 40.0, 20.0, 30.0]),
    make_workdir(root / "calm", CALM, [7.0, 1.0, 100.0]),
  )


def summarize(autoencoder: pathlib.Path, calm: pathlib.Path) -> dict[str, Any]:
  return summary.summarize([account_of(autoencoder), account_of(calm)], None)


def run_report(*flags: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, "-W", "error::UserWarning", "-m", "calm_jax.report", *flags]
  return subprocess.run(command, capture_output=True, text=True, timeout=60)


class Tags(html.parser.HTMLParser):
  """Collects the tags of a page and the targets of their references."""

  def __init__(self, text: str):
    super().__init__()
    self.open: list[str] = []
    self.names: list[str] = []
    self.targets: list[str] = []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.names.append(tag)
    if tag not in ("meta", "img"):
      self.open.append(tag)
    self.targets += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_the_page_is_self_contained(full_page: str):
  tags = Tags(full_page)
  assert not tags.open
  assert not {"script", "link", "iframe", "object"} & set(tags.names)
  assert all(target.startswith(("#run", "data:image/png;base64,")) for target in tags.targets)
  assert not re.search(r"https?:|url\(|@import", full_page)
  assert full_page.isascii()


def test_every_picture_of_a_complete_run_is_drawn(full_page: str):
  pictures = [
    picture
    for stage in ("autoencoder", "calm")
    for picture in table.STAGES[stage].presentation.pictures()
  ]
  for picture in pictures:
    assert f'<img alt="{picture.title}" src="data:' in full_page
  assert Tags(full_page).names.count("img") == len(pictures) == 17
  assert "Not drawn" not in full_page
  assert full_page.count('class="notes"') == 1


def test_figures_are_shown_with_standard_error_unit_and_direction(full_page: str):
  text = re.sub(r"<[^>]+>", "|", full_page)
  assert "|Token accuracy||99.800 &#177; 0.040||%||higher is better|" in text
  assert "|Cross-entropy||0.0100 &#177; 0.0010||nats a token||lower is better|" in text
  assert "|BrierLM||3.61 &#177; 0.12||%||higher is better|" in text
  assert "|BrierLM of the marginal||1.25||%||reached without any context|" in text
  assert "context in tokens 64, held-out blocks 8" in text


def test_texts_are_escaped_and_the_prompt_is_marked(full_page: str):
  assert (
    '<pre><span class="prompt">&lt;b&gt;if</span> a &lt; b &amp; c:&lt;/pre&gt;&lt;script&gt;</pre>'
  ) in full_page
  assert "temperature 0.5, seed 3, step 9" in full_page
  assert "<pre>caf&#233;</pre>" in full_page


def test_control_characters_are_escaped_on_the_page(calm: pathlib.Path):
  """Except newlines and tabs; also surrogates and characters that change the writing direction."""
  sample = {"prompt": "a\x1b[2J\t", "text": "\u202eb\x85\n\ud800caf\u00e9", "seed": "\x07"}
  write_lines(calm / workdir.SAMPLES, [sample])
  text = render(calm)
  assert '<span class="prompt">a\\x1b[2J\t</span>\\u202eb\\x85\n\\ud800caf&#233;</pre>' in text
  assert "seed &#x27;\\x07&#x27;" in text
  for control in ("\x1b", "\x07", "&#133;", "&#8238;", "&#55296;"):
    assert control not in text


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    (workdir.EVALUATION, {"brier_lm": "high"}, "'brier_lm' can't be 'high'"),
    (workdir.EVALUATION, {"brier_lm": [1]}, "'brier_lm' can't be [1]"),
    (workdir.EVALUATION, {"blocks": 10**400}, "'blocks' can't be 1000"),
    (workdir.EVALUATION, {"store_hash": {}}, "'store_hash' can't be {}"),
    (workdir.EVALUATION, {"kl_by_dimension": [0.5]}, "'kl_by_dimension' can't be [0.5]"),
    (workdir.EVALUATION, {"posterior_std_by_dimension": [math.inf]}, "can't be [inf]"),
    (workdir.EVALUATION, {"\x1b": "x"}, "'\\x1b' can't be 'x'"),
    (workdir.TRADEOFF, {"rows": {}}, "'rows' can't be {}"),
    (workdir.TRADEOFF, {"rows": [5]}, "'rows' can't be [5]"),
    (workdir.TRADEOFF, {"baseline": [{**TRADEOFF[0], "accuracy": []}]}, "'baseline' can't be [{"),
    (workdir.TRADEOFF, {"rows": [{**TRADEOFF[0], "draws": math.nan}]}, "'rows' can't be [{"),
  ],
)
def test_impossible_figures_are_reported_and_left_out(
  calm: pathlib.Path, name: str, changes: dict[str, Any], message: str
):
  values = json.loads((calm / name).read_text())
  (calm / name).write_text(json.dumps(values | changes))
  (note,) = (note for note in account_of(calm).notes if note.startswith("Figures that are"))
  assert str(calm / name) in note and message in note and note.endswith("; evaluate again.")
  assert "\n" not in note and len(note) < 1000


@pytest.mark.parametrize(
  "changes",
  [
    {"step": True}, {"step": -1}, {"step": 10**400}, {"loss": "x"}, {"loss": 10**400},
    {"flops": "many"}, {"seconds": [1]}, {"kl_by_dimension": [1.0]}, {"loss": {"a": []}},
  ],
)  # fmt: skip
def test_an_impossible_line_of_metrics_is_left_out_and_counted(
  calm: pathlib.Path, changes: dict[str, Any]
):
  first, *rest = train_records(CALM, [7.0, 1.0, 100.0])
  write_lines(calm / workdir.METRICS, [first | changes, *rest])
  account = account_of(calm)
  assert len(account.train) == 2
  assert "Unreadable lines of metrics.jsonl that are left out: 1." in account.notes


def test_totals_of_missing_figures_are_left_out(calm: pathlib.Path):
  reports = train_records(CALM, [7.0, 1.0])
  reports[-1] |= {"flops": None, "seconds": None}
  write_lines(calm / workdir.METRICS, reports)
  totals = dict(tables.totals(account_of(calm)))
  assert totals["Time training"] == "2 s" and "Training FLOPs" not in totals


def test_a_page_replaces_the_previous_one(tmp_path: pathlib.Path):
  run = make_workdir(tmp_path / "young", AUTOENCODER, [5.0], complete=False)
  account = account_of(run)
  first = pathlib.Path(page.write([account], str(tmp_path))).read_text()
  write_lines(run / workdir.METRICS, train_records(AUTOENCODER, [5.0, 6.0]))
  second = pathlib.Path(page.write([account_of(run)], str(tmp_path))).read_text()
  assert "10 of 40" in first and "20 of 40" in second


@pytest.mark.parametrize("run", [AUTOENCODER, CALM])
def test_what_an_unfinished_run_lacks_is_stated(tmp_path: pathlib.Path, run: config.Run):
  directory = make_workdir(tmp_path / "young", run, [5.0], complete=False)
  text = render(directory)
  assert "The run is not finished: 10 of 40 steps are reported." in text
  assert f"python -m calm_jax.evaluate --workdir={directory}" in text
  assert "No evaluation yet." in text
  assert ("python -m calm_jax.generate" in text) == (run is CALM)
  assert ("Not drawn: this run has no figures of brier_lm." in text) == (run is CALM)


def test_the_evaluation_of_the_loop_replaces_a_missing_one(calm: pathlib.Path):
  (calm / workdir.EVALUATION).unlink()
  text = render(calm)
  assert "3.61 &#177; 0.12" in text and "from the training loop" in text
  assert "The line of the marginal is missing" in text


def test_skipped_steps_are_reported_and_leave_gaps(calm: pathlib.Path):
  reports = train_records(CALM, [1.0, 2.0, 3.0, 4.0])
  reports[1] |= {"loss": math.nan, "gradient_norm": math.inf, "skipped": 2.0}
  reports[3] |= {"skipped": 2.0, "learning_rate": 0.0, "update_norm": 0.0}
  write_lines(calm / workdir.METRICS, reports)
  assert "Skipped steps: 2." in render(calm)
  column = records.column(account_of(calm).train, "gradient_norm")
  assert column.tolist()[::2] == [0.5, 0.5] and math.isnan(column[1])


def test_long_runs_and_perfect_scores_draw_without_warnings(tmp_path: pathlib.Path):
  directory = make_workdir(tmp_path / "long", AUTOENCODER, [5.0] * 300)
  perfect = {"token_accuracy": 1.0, "token_accuracy_stderr": math.nan, "cross_entropy": 0.0}
  reports = [record | perfect for record in train_records(AUTOENCODER, [5.0] * 300)]
  reports += [{**reports[-1], **figures(AUTOENCODER), **perfect, "kind": "evaluation"}]
  write_lines(directory / workdir.METRICS, reports)
  assert "Not drawn" not in render(directory)


def test_a_truncated_last_line_is_skipped_and_broken_lines_are_counted(calm: pathlib.Path):
  first, *rest = (calm / workdir.METRICS).read_text().splitlines()
  lines = [first, '{"kind": "tra', "[1]", *rest, '{"kind": "train", "st']
  (calm / workdir.METRICS).write_text("\n".join(lines))
  account = account_of(calm)
  assert len(account.train) == 3 and len(account.evaluations) == 2
  assert "Unreadable lines of metrics.jsonl that are left out: 2." in account.notes


def test_the_summary_has_every_figure(autoencoder: pathlib.Path, calm: pathlib.Path):
  result = summarize(autoencoder, calm)
  assert list(result) == SUMMARY_KEYS
  assert result["ae_token_accuracy"] == 0.998 and result["ae_patch_accuracy"] == 0.99
  assert [result[f"brier_{n}"] for n in (1, 2, 4)] == [8.0, 4.0, 2.0]
  assert (result["brier_lm"], result["brier_lm_stderr"]) == (3.61, 0.12)
  assert result["brier_lm_marginal"] == 1.25
  assert (result["conditioning_gap"], result["conditioning_gap_stderr"]) == (0.7, 0.05)
  assert result["context_tokens"] == 64 and result["seconds_total"] is None
  # Medians of 10, 20, 30, 40 and of 1, 7, 100.
  assert result["train_tokens_per_second"] == {"autoencoder": 25.0, "calm": 7.0}
  assert result["text_samples"] == ["<b>if a < b & c:</pre><script>", "caf\u00e9"]
  assert result["versions"]["jax"] == importlib.metadata.version("jax")
  assert set(result["versions"]) == {"python", "calm_jax", *provenance.LIBRARIES}


def test_a_missing_figure_is_null(autoencoder: pathlib.Path, calm: pathlib.Path):
  final = json.loads((calm / workdir.EVALUATION).read_text())
  del final["brier_lm"], final["brier_4"]
  (calm / workdir.EVALUATION).write_text(json.dumps(final | {"brier_lm_stderr": math.nan}))
  result = json.loads(json.dumps(summarize(autoencoder, calm), allow_nan=False))
  assert result["brier_lm"] is result["brier_4"] is result["brier_lm_stderr"] is None


def test_the_summary_names_the_missing_command(autoencoder: pathlib.Path, calm: pathlib.Path):
  (autoencoder / workdir.EVALUATION).unlink()
  with pytest.raises(
    errors.CalmError, match=f"run python -m calm_jax.evaluate --workdir={autoencoder}$"
  ):
    summarize(autoencoder, calm)


def test_the_commit_is_marked_dirty_if_the_package_changed(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  package = tmp_path / "calm_jax"
  package.mkdir()
  (package / "__init__.py").write_text("")
  monkeypatch.setattr(provenance.calm_jax, "__file__", str(package / "__init__.py"))

  def git(*arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

  assert provenance.commit() is None
  git("init", "--quiet")
  git("commit", "--quiet", "--allow-empty", "-m", "Another repository")
  assert provenance.commit() is None
  git("add", ".")
  git("commit", "--quiet", "-m", "Ours")
  clean = provenance.commit()
  assert clean and re.fullmatch("[0-9a-f]{7,}", clean)
  (tmp_path / "benchmarks").mkdir()
  (tmp_path / "benchmarks" / "train-cpu.json").write_text("{}")
  assert provenance.commit() == clean
  (package / "__init__.py").write_text("changed")
  assert provenance.commit() == f"{clean}-dirty"


@pytest.mark.parametrize("name", [workdir.EVALUATION, workdir.TRADEOFF])
@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 9999])
def test_unreadable_figures_are_reported_and_left_out(calm: pathlib.Path, name: str, text: str):
  (calm / name).write_text(text)
  account = account_of(calm)
  (note,) = [note for note in account.notes if note.startswith("Figures that are left out")]
  assert str(calm / name) in note and note.endswith("evaluate again.")
  assert "<html" in render(calm)


def test_unreadable_files_of_the_ledger_are_reported(calm: pathlib.Path):
  (calm / ledger.FOLDER).mkdir()
  (calm / ledger.FOLDER / "0001.json").write_text("")
  notes = account_of(calm).notes
  assert "Attempts whose seconds can't be read and are left out: 1." in notes


def test_a_truncated_text_harms_neither_the_report_nor_the_next_text(calm: pathlib.Path):
  path = calm / workdir.SAMPLES
  path.write_bytes(path.read_bytes() + b'{"prompt": "to' + b"[" * 9999)
  workdir.append_samples(str(calm), [json.dumps({**SAMPLES[0], "text": "new"}) + "\n"])
  account = account_of(calm)
  assert [sample["text"] for sample in account.samples] == [
    *(sample["text"] for sample in SAMPLES), "new",
  ]  # fmt: skip
  assert "Unreadable lines of samples.jsonl that are left out: 1." in account.notes
  path.unlink()
  workdir.append_samples(str(calm), ["{}\n"])
  workdir.append_samples(str(calm), ["{}\n"])
  assert path.read_text() == "{}\n{}\n"


@pytest.mark.parametrize(
  ("name", "text", "reason"),
  [
    (workdir.METRICS, None, "has no figures yet.*after 10 steps"),
    (workdir.METRICS, '{"kind": "evaluation", "step": 1}\n', "has no figures yet"),
    ("config.json", "{}", "config.json was changed since"),
    ("config.json", None, "no workdir at"),
  ],
)
def test_a_bad_workdir_is_refused(calm: pathlib.Path, name: str, text: str | None, reason: str):
  if text is None:
    (calm / name).unlink()
  else:
    (calm / name).write_text(text)
  with pytest.raises(errors.CalmError, match=reason) as error:
    account_of(calm)
  assert "\n" not in str(error.value)


def test_the_command_writes_page_and_summary(
  tmp_path: pathlib.Path, autoencoder: pathlib.Path, calm: pathlib.Path
):
  output = tmp_path / "new" / "output"
  done = run_report(f"--workdir={autoencoder},{calm}", f"--output={output}", "--seconds_total=61.5")
  assert done.returncode == 0, done.stderr
  assert sorted(path.name for path in output.iterdir()) == [summary.FILE, page.FILE][::-1]
  result = json.loads((output / summary.FILE).read_text())
  assert list(result) == SUMMARY_KEYS and result["seconds_total"] == 61.5
  lines = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines())
  assert lines["brier_lm"] == "3.61" and lines["train_tokens_per_second.calm"] == "7"
  assert lines["text_samples"] == "2, the first: '<b>if a < b & c:</pre><script>'"


def test_the_command_reports_in_one_line_what_is_missing(
  tmp_path: pathlib.Path, calm: pathlib.Path
):
  done = run_report(f"--workdir={calm}", f"--output={tmp_path}/output")
  assert done.returncode == 0 and done.stdout == ""
  assert "no summary.json: it needs both stages, but no workdir is of stage 'autoencoder'" in (
    done.stderr
  )
  assert not (tmp_path / "output" / summary.FILE).exists()

  done = run_report(f"--workdir={calm}", "--output=/dev/null/output")
  assert done.returncode == 2
  assert re.fullmatch(r"error: can't write --output=/dev/null/output: .*\n", done.stderr)
