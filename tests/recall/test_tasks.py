"""Items are exact: an oracle that reads forward answers every question, and a guesser gets what chance says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyadlm.errors import UserError
from dyadlm.recall import TASKS, parse_task
from dyadlm.recall.tasks import TESTED, TRAINED, UNSCORED, permutation_table

SMALL = {
    "mqar": ["length=16,pairs=4,vocabulary=12", "length=64,pairs=8", "length=40,pairs=5,filler=blank,vocabulary=20"],
    "induction": ["length=3,symbols=2", "length=50"],
    "copying": ["length=8,tokens=4,symbols=3", "length=64"],
    "parity": ["length=1", "length=33"],
    "flipflop": ["length=4", "length=64", "length=64,ignore=0.1"],
    "permutations": ["length=20", "length=9,elements=3"],
    "needle": ["length=3", "length=60,pairs=4,vocabulary=32", "length=60,pairs=4,distance=48"],
    "path-star": ["length=8,path=2,nodes=3", "length=40,degree=3,path=4", "length=29,degree=3,path=4,ask=first"],
    "lookahead": ["length=9,strings=2,tokens=2,symbols=2", "length=64", "length=50,strings=3,ask=first"],
}
CASES = [(name, text) for name, texts in SMALL.items() for text in texts]


class Dictionary:
    """What followed each key, the first time."""

    def __init__(self, is_key):
        self.is_key, self.known, self.before = is_key, {}, None

    def __call__(self, token):
        answer = self.known.get(token) if self.is_key(token) else None
        if self.before is not None and self.is_key(self.before):
            self.known.setdefault(self.before, token)
        self.before = token
        return answer


class Copier:
    def __init__(self, symbols):
        self.symbols, self.queue = symbols, []

    def __call__(self, token):
        if token < self.symbols:
            self.queue.append(token)
        return self.queue.pop(0) if token == self.symbols + 1 else None


class FlipFlopper:
    def __init__(self):
        self.bit, self.before = None, None

    def __call__(self, token):
        if self.before == 2:
            self.bit = token
        self.before = token
        return self.bit if token == 4 else None


class Counter:
    def __init__(self):
        self.ones = 0

    def __call__(self, token):
        self.ones += token
        return self.ones % 2


class Composer:
    def __init__(self, elements):
        self.every, self.so_far = permutation_table(elements)[0], tuple(range(elements))

    def __call__(self, token):
        self.so_far = tuple(self.every[token][place] for place in self.so_far)
        return self.every.index(self.so_far)


class Planner:
    """Walks back from the goal to the start, and then forward."""

    def __init__(self, nodes):
        self.nodes, self.read, self.before, self.way = nodes, [], {}, None

    def __call__(self, token):
        if self.way is not None:
            return self.way.pop(0) if self.way else None
        if token == self.nodes + 1:
            mark = self.read.index(self.nodes)
            edges = self.read[:mark]
            before = dict(zip(edges[1::2], edges[0::2], strict=True))
            start, goal = self.read[mark + 1 :]
            self.way = [goal]
            while before[self.way[0]] != start:
                self.way.insert(0, before[self.way[0]])
            return self.way.pop(0)
        if token != self.nodes + 2:
            self.read.append(token)
        return None


class SlotLookup:
    """Reads a string forward when its end is named."""

    def __init__(self, symbols):
        self.bar, self.strings, self.open, self.way = symbols, {}, [], None

    def __call__(self, token):
        if self.way is not None:
            return self.way.pop(0) if self.way else None
        if token == self.bar:
            self.strings[self.open[-1]], self.open = self.open, []
        elif token == self.bar + 1:
            self.way = self.strings[self.open[0]]
            return self.way.pop(0)
        elif token < self.bar:
            self.open.append(token)
        return None


def oracle(task):
    """Answers question by question; it is shown one token after the other and never sees a later one."""
    return {
        "mqar": lambda: Dictionary(lambda token: True),
        "needle": lambda: Dictionary(lambda token: token < task.vocabulary // 4),
        "induction": lambda: Dictionary(lambda token: token == task.symbols),
        "copying": lambda: Copier(task.symbols),
        "parity": Counter,
        "flipflop": FlipFlopper,
        "permutations": lambda: Composer(task.elements),
        "path-star": lambda: Planner(task.nodes),
        "lookahead": lambda: SlotLookup(task.symbols),
    }[task.name]()


@pytest.mark.parametrize(("name", "text"), CASES)
def test_what_was_read_determines_every_answer(name, text):
    task = parse_task(name, text)
    asked = 0
    for number in range(30):
        tokens, answers = task.item("train", 1, number)
        assert tokens.shape == answers.shape == (task.length,)
        assert tokens.min() >= 0
        assert max(tokens.max(), answers.max()) < task.vocabulary
        reader = oracle(task)
        for token, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
            said = reader(token)
            if answer != UNSCORED:
                asked += 1
                assert said == answer
    assert asked == pytest.approx(30 * task.questions, rel=0.35)


GUESSES = {
    "mqar": lambda task, tokens, random: random.choice(tokens[1 : 2 * task.pairs : 2]),
    "needle": lambda task, tokens, random: random.integers(task.vocabulary // 4, task.vocabulary),
    "induction": lambda task, tokens, random: random.integers(task.symbols),
    "copying": lambda task, tokens, random: random.integers(task.symbols),
    "parity": lambda task, tokens, random: random.integers(2),
    "flipflop": lambda task, tokens, random: random.integers(2),
    "permutations": lambda task, tokens, random: random.integers(task.vocabulary),
    "path-star": lambda task, tokens, random: random.choice(neighbours(task, tokens)),
    "lookahead": lambda task, tokens, random: random.choice(beginnings(task, tokens)),
}


def neighbours(task, tokens):
    """Of the start: the nodes that an edge leads to from there."""
    mark = tokens.tolist().index(task.nodes)
    edges = tokens[tokens != task.nodes + 2][: 2 * task.degree * (task.path - 1)].reshape(-1, 2)
    return edges[edges[:, 0] == tokens[mark + 1], 1]


def beginnings(task, tokens):
    """The first symbols of all strings."""
    return tokens[tokens != task.symbols + 2][: task.strings * (task.tokens + 1)].reshape(task.strings, -1)[:, 0]


@pytest.mark.parametrize(("name", "text"), [(name, texts[-1]) for name, texts in SMALL.items()])
def test_a_guesser_is_right_as_often_as_chance_says(name, text):
    task, random = parse_task(name, text), np.random.default_rng(0)
    right = total = 0
    for number in range(600):
        tokens, answers = task.item("train", 2, number)
        for answer in answers[answers != UNSCORED][:8]:
            right += GUESSES[name](task, tokens, random) == answer
            total += 1
    error = (task.chance * (1 - task.chance) / total) ** 0.5
    assert abs(right / total - task.chance) < 4 * error


@pytest.mark.parametrize("name", TASKS)
def test_an_item_depends_on_its_number_alone(name):
    task = parse_task(name)
    alone = task.item("train", 3, 5)
    among = task.items("train", 3, range(8))
    assert all(np.array_equal(one, many[5]) for one, many in zip(alone, among, strict=True))
    again = parse_task(name).items("train", 3, range(8))
    assert all(np.array_equal(one, other) for one, other in zip(among, again, strict=True))
    for different in (task.items("train", 4, range(8)), task.items("test", 3, range(8))):
        assert not np.array_equal(among[0], different[0])
    assert len({row.tobytes() for row in among[0]}) == 8


def test_items_to_score_are_none_of_those_trained_on():
    task = parse_task("mqar", "length=64,pairs=4")
    trained, asked = (task.items(split, 0, range(500))[0] for split in ("train", "test"))
    assert not {row.tobytes() for row in trained} & {row.tobytes() for row in asked}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 40), st.integers(26, 60), st.integers(0, 10**6))
def test_a_key_comes_twice_and_no_other_token_is_one(pairs, more, vocabulary, number):
    task = parse_task("mqar", f"length={4 * pairs + more},pairs={pairs},vocabulary={vocabulary}")
    tokens, answers = task.item("train", 0, number)
    keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
    assert len(set(keys)) == len(set(values)) == pairs
    assert keys.min() >= 1
    assert keys.max() < vocabulary // 2 <= values.min()
    assert sorted(tokens[answers >= 0]) == sorted(keys)
    assert np.isin(tokens, keys).sum() == 2 * pairs
    assert ((np.flatnonzero(answers >= 0) - 2 * pairs) % 2 == 0).all()


def test_other_tokens_are_uniform_over_what_is_no_key():
    task = parse_task("mqar", "length=512,pairs=2,vocabulary=10")
    counts, expected = np.zeros(10), np.zeros(10)
    for number in range(200):
        tokens, answers = task.item("train", 0, number)
        rest = tokens[4:][answers[4:] < 0]
        counts += np.bincount(rest, minlength=10)
        free = np.setdiff1d(np.arange(10), tokens[0:4:2])
        expected[free] += len(rest) / len(free)
    assert np.abs(counts - expected).max() < 4 * expected.max() ** 0.5


def test_gaps_follow_the_power_law():
    task = parse_task("mqar", "length=44,pairs=1")
    first = np.array([np.flatnonzero(task.item("train", 0, n)[1] >= 0)[0] for n in range(3000)])
    weights = np.arange(1, 22) ** -0.99
    expected = 3000 * weights / weights.sum()
    counts = np.bincount((first - 2) // 2, minlength=21)
    assert ((counts - expected) ** 2 / expected).sum() < 46  # chi-square of 20 degrees at 0.001


def test_a_needle_is_as_far_as_it_says():
    task = parse_task("needle", "length=3000,distance=2500")
    tokens, answers = task.item("test", 0, 7)
    planted, asked = np.flatnonzero(tokens < 64)
    assert asked - (planted + 1) - 1 == 2500
    assert answers[asked] == tokens[planted + 1]
    assert asked == 2999


@pytest.mark.parametrize("degree", [2, 5])
def test_a_star_has_arms_of_its_length_in_any_order(degree):
    task = parse_task("path-star", f"length=64,degree={degree},path=6,nodes=60")
    first_edges = set()
    for number in range(40):
        tokens, answers = task.item("train", 0, number)
        mark = tokens.tolist().index(60)
        edges = tokens[tokens != 62][: 2 * 5 * degree].reshape(-1, 2)
        assert len(np.unique(edges)) == 5 * degree + 1
        assert len(np.unique(edges[:, 1])) == 5 * degree  # one way to each
        start, goal = tokens[mark + 1 : mark + 3]
        assert (edges[:, 0] == start).sum() == degree
        assert goal not in edges[:, 0]
        assert tokens[mark + 3] == 61
        assert np.flatnonzero(answers >= 0).tolist() == list(range(mark + 3, mark + 8))
        assert answers[mark + 7] == goal
        assert tokens[mark + 4 :].tolist() == answers[mark + 3 : mark + 7].tolist()  # taught by the true steps
        first_edges.add(int(np.flatnonzero(edges[:, 0] == start)[0]))
        once, first = parse_task("path-star", str(task) + ",ask=first"), np.flatnonzero(answers >= 0)[0]
        assert once.questions == 1
        assert parse_task("path-star", str(once)) == once
        assert np.flatnonzero(once.item("train", 0, number)[1] >= 0).tolist() == [first]
    assert len(first_edges) > 3


def test_first_and_last_symbols_tell_strings_apart_and_the_others_do_not():
    task = parse_task("lookahead", "length=30,strings=4,tokens=4,symbols=5")
    middles, places = 0, np.zeros(4)
    for number in range(50):
        tokens, answers = task.item("train", 0, number)
        strings = tokens[tokens != 7][:20].reshape(4, 5)
        assert (strings[:, 4] == 5).all()
        assert len(set(strings[:, 0])) == len(set(strings[:, 3])) == 4
        middles += len(set(strings[:, 1]))
        (place,) = np.flatnonzero(strings[:, 3] == tokens[-5])
        asked = strings[place, :4]
        places[place] += 1
        assert answers[-4:].tolist() == asked.tolist()
        assert tokens[-4:].tolist() == [6, *asked[:3]]
    assert middles < 190
    assert places.min() >= 4


def test_chance_is_that_of_a_guess_at_the_first_step_and_none_after_it():
    assert parse_task("path-star", "length=64,degree=4,path=5").chance == pytest.approx((1 / 4 + 3) / 4)
    assert parse_task("path-star", "length=64,degree=4,path=5,ask=first").chance == 1 / 4
    assert parse_task("lookahead", "length=64,strings=5,tokens=8").chance == pytest.approx((1 / 5 + 7) / 8)
    assert parse_task("lookahead", "length=64,strings=5,tokens=8,ask=first").chance == 1 / 5


def test_permutations_are_applied_one_after_the_other():
    every, then = permutation_table(3)
    swap_first, rotate = every.index((1, 0, 2)), every.index((1, 2, 0))
    assert every[then[swap_first, rotate]] == (2, 1, 0)  # 0 → 1 → 2
    assert (then[0] == np.arange(6)).all()
    assert (then[:, 0] == np.arange(6)).all()


@pytest.mark.parametrize("name", TASKS)
def test_standard_parameters_are_those_of_the_task(name):
    for text in (*TRAINED[name], *TESTED[name]):
        assert parse_task(name, str(parse_task(name, text))) == parse_task(name, text)


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("mqarr", "", "choose one of mqar"),
        ("mqar", "pair=4", "pairs"),
        ("mqar", "length=many", "whole number"),
        ("mqar", "length=8,pairs=4", "length=16"),
        ("mqar", "vocabulary=8", "vocabulary"),
        ("mqar", "filler=rain", "random"),
        ("mqar", "power=0", "above 0"),
        ("induction", "length=2", "at least 3"),
        ("induction", "symbols=0", "at least 1"),
        ("copying", "length=16,tokens=9", "length=18"),
        ("flipflop", "length=7", "even"),
        ("flipflop", "ignore=2", "from 0 to 1"),
        ("permutations", "elements=7", "from 2 to 6"),
        ("needle", "length=100,distance=99", "length=102"),
        ("needle", "length=100,pairs=9,vocabulary=32", "vocabulary=36"),
        ("path-star", "path=1", "at least 2"),
        ("path-star", "degree=1", "at least 2"),
        ("path-star", "length=100,degree=5,path=11", "nodes=51"),
        ("path-star", "length=22", "length=23"),
        ("lookahead", "tokens=1", "at least 2"),
        ("lookahead", "strings=1", "at least 2"),
        ("lookahead", "symbols=3", "symbols=4"),
        ("lookahead", "length=44", "length=45"),
    ],
)
def test_what_cannot_be_says_what_can(name, text, remedy):
    with pytest.raises(UserError, match=remedy):
        parse_task(name, text)
