"""A mistyped name -> the known names that are most like it."""

import difflib
from collections.abc import Iterable

# Least likeness, in [0, 1], of a name that is suggested, and how far it may be below the best.
LEAST, SLACK = 0.7, 0.1


def likeness(name: str, known: str) -> float:
  """Returns how much `name` resembles or abbreviates `known`, in [0, 1]."""
  words, known_words = name.split("_"), known.split("_")
  if len(known_words) > 1 and name == "".join(word[0] for word in known_words if word):  # lr
    return 0.9
  if set(words) <= set(known_words) or set(known_words) <= set(words):  # warmup, batch_size
    return 1.0 if name == known else 0.85
  swapped = 0.85 if sorted(name) == sorted(known) else 0.0  # The same letters in another order.
  return max(swapped, difflib.SequenceMatcher(None, name, known).ratio())


def similar(name: str, known: Iterable[str]) -> list[str]:
  """Returns the known names that are most like `name`, at most three, the best first.

  Names may be dotted, as in training.steps: the last part decides which names are returned,
  the section before it decides their order.
  """
  section, last = _split(name.lower())
  scores = {}
  for candidate in known:
    its_section, its_last = _split(candidate.lower())
    score = likeness(last, its_last)
    if score >= LEAST:
      near = difflib.SequenceMatcher(None, section, its_section).ratio() if section else 0.0
      scores[candidate] = score + SLACK * near
  best = max(scores.values(), default=0.0)
  ordered = sorted(scores, key=lambda candidate: -scores[candidate])
  return [candidate for candidate in ordered if scores[candidate] >= best - SLACK][:3]


def _split(name: str) -> tuple[str, str]:
  """Returns the section and the last part of a name; a dot before a digit is a decimal point."""
  section, dot, last = name.rpartition(".")
  return ("", name) if not dot or last[:1].isdigit() else (section, last)
