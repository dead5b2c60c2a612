"""Claims about suggestions: the known name that was meant comes first."""

from calm_jax import config, spelling


def test_the_last_part_decides_and_the_section_orders():
  known = ["model.width", "training.batch", "head.width", "training.steps"]
  assert spelling.similar("head.wdith", known) == ["head.width", "model.width"]
  assert spelling.similar("qqq", known) == []


def test_a_dot_before_a_digit_is_a_decimal_point():
  assert spelling.similar("alpha_1.2", ["alpha_1.25", "alpha_0.75", "k_2"])[0] == "alpha_1.25"


def test_a_sentence_lists_all_names_and_suggests_one():
  assert config.nearest("cosin", ["wsd", "cosine"]) == "did you mean 'cosine'? known: cosine, wsd"
  assert config.nearest("", ["wsd", "cosine"]) == "known: cosine, wsd"
