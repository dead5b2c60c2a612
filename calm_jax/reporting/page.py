"""Accounts of runs -> one self-contained HTML page."""

import base64
import html
from collections.abc import Iterable, Sequence

from etils import epath

from calm_jax import config, errors, files
from calm_jax.generation import text
from calm_jax.reporting import drawing, provenance, records, tables
from calm_jax.training import ledger

FILE = "report.html"

_STYLE = """
:root { color-scheme: light; --ink: #222; --soft: #666; --line: #e2e2e2; --tint: #f7f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 4rem; color: var(--ink);
  background: #fff; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 .25rem; padding-top: 1.25rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p { margin: .35rem 0; max-width: 46rem; }
a { color: #0072B2; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .86em; }
.soft, figcaption, dt { color: var(--soft); }
.notes { background: #fff6e5; border-left: 4px solid #E69F00; padding: .4rem 1rem; }
.notes p { max-width: none; }
.notes, code { overflow-wrap: anywhere; }
dl { display: grid; gap: .5rem 1rem; margin: .75rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(9rem, 45%), 1fr)); }
.settings { grid-template-columns: repeat(auto-fill, minmax(min(11.5rem, 45%), 1fr)); }
dt { font-size: .8rem; } dd { margin: 0; font-variant-numeric: tabular-nums; }
.settings dd { font-size: .92rem; }
.totals dd { font-size: 1.1rem; font-weight: 600; }
dd, dt { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; }
th, td { text-align: left; padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line); }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; font-weight: 600; }
.pictures { display: grid; gap: 1.25rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure h3 { margin: .75rem 0 .25rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .88rem; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px;
  padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0 1rem; }
.prompt { color: #0072B2; background: #e3f1fa; font-weight: 600; }
footer { margin-top: 3rem; font-size: .85rem; color: var(--soft); }
@media (max-width: 40rem) {
  table { font-size: .8rem; } th, td { padding-right: .6rem; }
}
@media print {
  body { font-size: 10.5pt; max-width: none; padding: 0; }
  .pictures { grid-template-columns: 1fr 1fr; gap: .75rem 1.25rem; }
  section + section { break-before: page; }
  h3 { break-after: avoid; }
  .scroll { break-inside: avoid; }
  .notes, .prompt, pre { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def render(accounts: Sequence[records.Account]) -> str:
  """Returns the page of all accounts, in ASCII, which is the same in any encoding."""
  links = " &middot; ".join(
    f'<a href="#run{i}">{_heading(account)}</a>' for i, account in enumerate(accounts)
  )
  made_by = [f"{name} {value or 'unknown'}" for name, value in provenance.versions().items()]
  page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>CALM report</title><style>{_STYLE}</style></head><body>
<h1>CALM report</h1>
<p>{links}</p>
{"".join(_section(i, account) for i, account in enumerate(accounts))}
<footer>{_escape(", ".join(made_by))}, commit {_escape(provenance.commit() or "unknown")}</footer>
</body></html>
"""
  return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def write(accounts: Sequence[records.Account], output: str) -> str:
  """Writes report.html into the folder `output`, creating it if needed, and returns its path.

  Raises:
    CalmError: if it can't be written.
  """
  path = epath.Path(output)
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.CalmError(f"can't write --output={output}: {error}") from error
  files.write(path / FILE, render(accounts))
  return str(path / FILE)


def _escape(value: object) -> str:
  return html.escape(text.visible(str(value)))


def _heading(account: records.Account) -> str:
  return f"{account.presentation.heading} ({_escape(epath.Path(account.directory).name)})"


def _section(number: int, account: records.Account) -> str:
  notes = "".join(f"<p>{_escape(note)}</p>" for note in account.notes)
  pictures = "".join(_picture(picture, account) for picture in account.presentation.pictures())
  return f"""<section id="run{number}"><h2>{_heading(account)}</h2>
<p class="soft"><code>{_escape(account.directory)}</code></p>
{_pairs(tables.totals(account), "totals")}
{f'<div class="notes">{notes}</div>' if notes else ""}
<h3>Settings</h3>
{_pairs(tables.settings(account.run, account.presentation.settings), "settings")}
{_goodput(account)}
<h3>Evaluation on held-out text</h3>
{_evaluation(account)}
<div class="pictures">{pictures}</div>
{_texts(account) if account.generates else ""}
</section>
"""


def _pairs(rows: Iterable[tuple[str, str]], name: str) -> str:
  cells = (f"<div><dt>{_escape(k)}</dt><dd>{_escape(v)}</dd></div>" for k, v in rows)
  return f'<dl class="{name}">{"".join(cells)}</dl>'


def _goodput(account: records.Account) -> str:
  goodput = ledger.goodput(epath.Path(account.directory))
  if goodput is None:
    return ""
  return f"<h3>Where the time went</h3>{_pairs(tables.goodput(goodput), 'settings')}"


def _evaluation(account: records.Account) -> str:
  figures = account.best_evaluation
  if figures is None:
    return '<p class="soft">No evaluation yet.</p>'
  rows = "".join(
    f'<tr><td>{_escape(label)}</td><td class="number">{_escape(value)}</td>'
    f'<td>{_escape(unit)}</td><td class="soft">{_escape(direction)}</td></tr>'
    for label, value, unit, direction in tables.evaluation(account.presentation.figures, figures)
  )
  source = "evaluation.json" if figures is account.evaluation else "the training loop"
  rest = (f"{name} {value}" for name, value in tables.conditions(figures))
  conditions = ", ".join((f"from {source}", *rest))
  return f"""<div class="scroll"><table>
<tr><th>Figure</th><th>Value &plusmn; standard error</th><th>Unit</th><th>Direction</th></tr>
{rows}</table></div><p class="soft"><small>{_escape(conditions)}</small></p>"""


def _picture(picture: drawing.Picture, account: records.Account) -> str:
  png, title = picture.png(account), _escape(picture.title)
  if png is None:
    caption, image = f"Not drawn: this run has no figures of {picture.needs}.", ""
    if picture.flags:
      caption = f"Not drawn; this command measures it: {account.evaluate_command} {picture.flags}"
  else:
    caption = f"{picture.caption} {picture.caveat(account)}"
    data = base64.b64encode(png).decode("ascii")
    image = f'<img alt="{title}" src="data:image/png;base64,{data}">'
  return f"<figure><h3>{title}</h3>{image}<figcaption>{_escape(caption)}</figcaption></figure>"


def _texts(account: records.Account) -> str:
  if not account.samples:
    return '<h3>Texts</h3><p class="soft">No texts yet.</p>'
  blocks = []
  for sample in account.samples:
    conditions = [
      f"{name} {sample[name]:.4g}"
      if isinstance(sample[name], float)
      else f"{name} {config.shown(sample[name])}"
      for name in ("temperature", "num_candidates", "seed", "number", "step")
      if name in sample
    ]
    prompt = f'<span class="prompt">{_escape(sample["prompt"])}</span>' if sample["prompt"] else ""
    blocks.append(
      f'<p class="soft"><small>{_escape(", ".join(conditions))}</small></p>'
      f"<pre>{prompt}{_escape(sample['text'])}</pre>"
    )
  return f'<h3>Texts</h3><p>The prompt is <span class="prompt">marked</span>.</p>{"".join(blocks)}'
