"""Episodes are paired and repeatable, and the statistics over institutions are the ones that they claim to be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from metarisk_common.errors import DataError
from metarisk_common.evaluation import (
    EpisodeScore,
    EvaluationSet,
    Predictor,
    paired_difference,
    run_episodes,
    share_harmed,
    summarise,
)
from metarisk_common.intervals import crossover
from metarisk_common.metrics import score_all
from metarisk_common.tasks import few_shot_draw

Array = npt.NDArray[Any]


def dataset(name: str, rows: int = 300, seed: int = 0) -> EvaluationSet:
    """Records whose second raw column is their row number, so that a method can tell which it was given."""
    generator = np.random.default_rng([seed, len(name)])
    x = generator.normal(size=(rows, 3)).astype(np.float32)
    y = (generator.random(rows) < 1 / (1 + np.exp(-x[:, 0]))).astype(np.float32)
    return EvaluationSet(name, x, np.column_stack([x[:, 0], np.arange(rows)]).astype(np.float64), y)


@dataclass(frozen=True)
class Spy:
    """A method that scores by the first input and tells what it was given."""

    name: str
    tell: Callable[[str, Array, Array], None]
    needs_support: bool = False
    sign: float = 1.0

    def fit(self, x: Array, raw: Array, y: Array) -> Predictor:
        assert x.shape == (len(y), 3)
        self.tell("support", raw[:, 1], y)

        def predict(x: Array, raw: Array) -> Array:
            self.tell("query", raw[:, 1], y)
            return np.asarray(1 / (1 + np.exp(-self.sign * x[:, 0].astype(np.float64))))

        return predict


def silent(_part: str, _rows: Array, _y: Array) -> None:
    """Tell nobody."""


def scores_of(table: dict[tuple[str, str, int], list[float]]) -> list[EpisodeScore]:
    """Episodes from (method, institution, k) to the AUC of each draw; the other metrics follow from it."""
    return [
        EpisodeScore(
            institution,
            k,
            draw,
            method,
            {"auc": auc, "ks": auc / 2, "log_loss": 1 - auc, "brier": (1 - auc) / 2, "calibration": auc / 10},
        )
        for (method, institution, k), values in table.items()
        for draw, auc in enumerate(values)
    ]


def test_supports_are_nested_and_the_query_is_one_for_all() -> None:
    seen: dict[str, list[set[int]]] = {"support": [], "query": []}

    def tell(part: str, rows: Array, _y: Array) -> None:
        seen[part].append({int(row) for row in rows})

    run_episodes([dataset("a")], [Spy("one", tell), Spy("two", tell)], [0, 10, 50], draws=1, seed=3)
    nothing, ten, fifty = seen["support"][:3]
    assert (len(nothing), len(ten), len(fifty)) == (0, 10, 50)
    assert ten < fifty
    assert seen["support"][3:] == [nothing, ten, fifty]
    assert all(query == set(range(300)) - fifty for query in seen["query"])
    assert len(seen["query"]) == 6


def test_scores_are_those_of_the_named_draw() -> None:
    own = dataset("a")
    scores = run_episodes([own], [Spy("one", silent)], [0, 20], draws=2, seed=5)
    for draw in (0, 1):
        query = few_shot_draw(own.y, k_min=20, k_max=20, seed_parts=(5, "a", draw), where="a").query
        expected = score_all(own.y[query], 1 / (1 + np.exp(-own.x[query, 0].astype(np.float64))))
        for score in scores:
            if score.draw == draw:
                assert score.values == expected


def test_one_more_method_or_institution_changes_nothing_for_the_others() -> None:
    few = run_episodes([dataset("a")], [Spy("one", silent)], [0, 10, 20], draws=3, seed=1)
    more = run_episodes(
        [dataset("b"), dataset("a")], [Spy("two", silent, sign=-1.0), Spy("one", silent)], [20, 0, 10], draws=3, seed=1
    )
    assert set(few) <= set(more)
    assert len(more) == 2 * 2 * 3 * 3
    assert few != run_episodes([dataset("a")], [Spy("one", silent)], [0, 10, 20], draws=3, seed=2)


def test_a_method_that_needs_labels_has_no_figure_without_them() -> None:
    methods = [Spy("local", silent, needs_support=True), Spy("shared", silent)]
    scores = run_episodes([dataset("a")], methods, [0, 10], draws=1, seed=0)
    assert {(score.method, score.k) for score in scores} == {("local", 10), ("shared", 0), ("shared", 10)}


def test_a_predictor_that_ignores_labels_is_scored_once_a_draw() -> None:
    calls = []

    @dataclass(frozen=True)
    class Fixed:
        name: str = "fixed"
        needs_support: bool = False

        def fit(self, _x: Array, _raw: Array, _y: Array) -> Predictor:
            return predict

    def predict(x: Array, _raw: Array) -> Array:
        calls.append(len(x))
        return np.asarray(1 / (1 + np.exp(-x[:, 0].astype(np.float64))))

    scores = run_episodes([dataset("a"), dataset("bb")], [Fixed()], [0, 10, 20], draws=2, seed=0)
    assert calls == [280] * 4
    assert len(scores) == 12
    assert len({(score.institution, score.draw, score["auc"]) for score in scores}) == 4


def test_progress_counts_draws() -> None:
    steps: list[tuple[int, int]] = []
    run_episodes(
        [dataset("a"), dataset("b")],
        [Spy("one", silent)],
        [10],
        draws=2,
        seed=0,
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_institution_that_is_too_small_is_named() -> None:
    with pytest.raises(DataError, match="Little Bank"):
        run_episodes([dataset("a"), dataset("Little Bank", 40)], [Spy("one", silent)], [0, 50], draws=1, seed=0)


def test_a_method_that_gives_no_probabilities_is_named() -> None:
    @dataclass(frozen=True)
    class Broken:
        name: str = "broken"
        needs_support: bool = False

        def fit(self, _x: Array, _raw: Array, _y: Array) -> Predictor:
            return lambda x, _raw: np.full(len(x), np.nan)

    with pytest.raises(ValueError, match=r"'broken' at k=10 on institution 'a': 290 of 290 scores are not finite"):
        run_episodes([dataset("a")], [Broken()], [10], draws=1, seed=0)


@pytest.mark.parametrize(
    ("names", "methods", "ks", "draws"),
    [
        ("aa", ["m"], [10], 1),
        ("a", ["m", "m"], [10], 1),
        ("a", ["m"], [10, 10], 1),
        ("a", ["m"], [-1, 10], 1),
        ("a", ["m"], [10], 0),
        ("", ["m"], [10], 1),
        ("a", [], [10], 1),
        ("a", ["m"], [], 1),
    ],
)
def test_what_makes_no_experiment_is_refused(names: str, methods: list[str], ks: list[int], draws: int) -> None:
    with pytest.raises(ValueError, match=r"ks must|twice|there is no"):
        run_episodes([dataset(n) for n in names], [Spy(m, silent) for m in methods], ks, draws=draws, seed=0)


def test_draws_are_averaged_within_an_institution_before_institutions_are_counted() -> None:
    scores = scores_of({("m", "a", 10): [0.6, 0.8], ("m", "b", 10): [0.5], ("m", "c", 10): [0.9, 0.9, 0.9]})
    found = summarise(scores)["m"]["10"]
    means = [0.7, 0.5, 0.9]
    assert found["auc"]["mean"] == pytest.approx(0.7)
    expected = stats.t.interval(0.95, 2, loc=0.7, scale=stats.sem(means))
    assert found["auc"]["ci95"] == pytest.approx(expected)
    assert found["log_loss"]["mean"] == pytest.approx(0.3)
    assert found["ks"]["mean"] == pytest.approx(0.35)
    assert found["brier"]["mean"] == pytest.approx(0.15)
    assert found["worst_decile"] == {"auc": pytest.approx(0.5)}
    assert found["institutions"] == 3


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        table = {("m", str(i), 10): [float(value)] for i, value in enumerate(generator.normal(0.7, 0.05, 5))}
        low, high = summarise(scores_of(table))["m"]["10"]["auc"]["ci95"]
        assert low is not None
        assert high is not None
        covered += low < 0.7 < high
    # 95% of 400 is 380 +- 4.4; a normal quantile in place of Student's would cover 88%.
    assert 365 <= covered <= 394


def test_the_worst_decile_is_the_lowest_tenth_rounded_up() -> None:
    table = {("m", f"{i:02}", 10): [0.5 + i / 100] for i in range(21)}
    assert summarise(scores_of(table))["m"]["10"]["worst_decile"]["auc"] == pytest.approx(0.51)


def test_one_institution_leaves_the_interval_open() -> None:
    found = summarise(scores_of({("m", "a", 0): [0.6, 0.7], ("m", "a", 10): [0.6, 0.7]}))["m"]
    assert found["0"]["auc"] == {"mean": pytest.approx(0.65), "ci95": [None, None]}
    assert list(found) == ["0", "10"]


def test_a_paired_difference_is_far_tighter_than_the_institutions_are_alike() -> None:
    generator = np.random.default_rng(1)
    level = generator.uniform(0.5, 0.9, 20)
    table = {("a", str(i), 50): [value + 0.01, value + 0.02] for i, value in enumerate(level)}
    table |= {("b", str(i), 50): [value, value] for i, value in enumerate(level)}
    table["b", "0", 50] = [level[0] + 0.1, level[0] + 0.1]
    found = paired_difference(scores_of(table), "a", "b", 50)
    differences = [0.015 - 0.1] + [0.015] * 19
    assert found["mean"] == pytest.approx(np.mean(differences))
    expected = stats.t.interval(0.95, 19, loc=np.mean(differences), scale=stats.sem(differences))
    assert found["ci95"] == pytest.approx(expected)
    assert (found["wins"], found["losses"]) == (19, 1)
    assert found["by_institution"]["0"] == pytest.approx(-0.085)


def test_a_win_in_log_loss_is_a_lower_one() -> None:
    scores = scores_of({("a", "x", 10): [0.8], ("b", "x", 10): [0.7], ("a", "y", 10): [0.6], ("b", "y", 10): [0.6]})
    found = paired_difference(scores, "a", "b", 10, "log_loss")
    assert found["mean"] == pytest.approx(-0.05)
    assert (found["wins"], found["losses"]) == (1, 0)


def test_the_two_sides_may_have_different_k() -> None:
    scores = scores_of({("a", "x", 0): [0.6, 0.7], ("a", "x", 50): [0.7, 0.7]})
    assert paired_difference(scores, "a", "a", 50, k_b=0)["mean"] == pytest.approx(0.05)


def test_what_is_not_paired_is_refused() -> None:
    scores = scores_of({("a", "x", 10): [0.6, 0.7], ("b", "x", 10): [0.7]})
    for compare in (
        lambda: paired_difference(scores, "a", "b", 10),
        lambda: paired_difference(scores, "a", "c", 10),
        lambda: paired_difference(scores, "c", "c", 10),
        lambda: share_harmed(scores, "a", 10),
    ):
        with pytest.raises(ValueError, match="same draws"):
            compare()


def test_harm_is_a_loss_beyond_the_tolerance() -> None:
    scores = scores_of(
        {
            ("m", "a", 0): [0.70, 0.70],
            ("m", "a", 50): [0.697, 0.69],
            ("m", "b", 0): [0.6, 0.6],
            ("m", "b", 50): [0.7, 0.58],
        }
    )
    assert share_harmed(scores, "m", 50) == 0.5
    assert share_harmed(scores, "m", 50, tolerance=0.0) == 0.75
    assert share_harmed(scores, "m", 50, tolerance=0.015) == 0.25
    assert share_harmed(scores, "m", 0) == 0.0


@pytest.mark.parametrize(
    ("lows", "labels", "words"),
    [
        ({10: 0.04, 20: 0.02, 50: -0.01}, 40, "about 40"),
        ({0: -1.0, 10: 0.04, 20: 0.0}, 20, "about 20"),
        ({50: 0.02, 10: -0.01}, 10, "at most 10"),
        ({10: 0.04, 200: 0.01}, None, "beyond 200"),
        ({10: 0.04, 20: None, 50: 0.1}, 20, "about 20"),
    ],
)
def test_the_crossover_is_where_the_lower_end_reaches_nothing(
    lows: dict[int, float | None], labels: float | None, words: str
) -> None:
    found = crossover({k: {"mean": 0.1, "ci95": [low, None if low is None else 0.2]} for k, low in lows.items()})
    assert found.labels == (None if labels is None else pytest.approx(labels))
    assert str(found) == words


def test_a_crossover_needs_labels() -> None:
    with pytest.raises(ValueError, match="one k above 0"):
        crossover({0: {"mean": 0.1, "ci95": [0.0, 0.2]}})
