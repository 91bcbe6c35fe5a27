"The check of exercises: what it calls the same, what it says differs, and that every hidden solution passes and its wrong twin does not."
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from subspace_nb import answers, exercises
from subspace_nb.exercises import (Exercise, Verdict, as_tensor, check, difference, draw, exercise, find, fresh, hint, is_stub, kind_of, registry, self_test)
from subspace_nb.tasks import TaskVector

numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: 0. if abs(x)<1e-3 else x)


@pytest.fixture
def own():
    before = dict(registry)
    yield
    registry.clear(); registry.update(before)


# every exercise of the book

@pytest.mark.parametrize('number', sorted(registry))
def test_every_solution_passes_and_every_wrong_answer_fails(number):
    refused = self_test(number)
    assert refused and not any(refused) and all(v.text!='not written yet' and '\n' not in v.text for v in refused)


@pytest.mark.parametrize('number', sorted(registry))
def test_every_exercise_has_a_hint_and_a_stub_is_not_a_mistake(number):
    assert find(number).hint and '\n' not in hint(number)
    assert repr(check(number))==f'{number}: not written yet'


def notebooks(): return sorted((Path(__file__).parent.parent/'nbs').glob('[0-9]*.ipynb'))

def test_chapters_ask_what_answers_answer():
    asked = set()
    for p in notebooks():
        if p.stem[:2]=='95': continue
        code = '\n'.join(''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code')
        found = {n for n in re.findall(r"^check\('(\d\d\.\d+)', \w+\)", code, re.M) if n[:2]!='99'}
        assert all(n[:2]==p.stem[:2] for n in found), p.stem
        asked |= found
    assert asked==set(registry), asked ^ set(registry)


# the same or not

@given(st.lists(numbers, min_size=1, max_size=9))
def test_any_container_will_do(xs):
    forms = [xs, tuple(xs), np.array(xs), torch.tensor(xs, dtype=torch.float64), [torch.tensor(x, dtype=torch.float64) for x in xs], [np.float64(x) for x in xs],
             torch.tensor(xs, dtype=torch.float64, requires_grad=True)]
    for a in forms:
        for b in forms: assert difference(a, b)==''


@given(st.lists(numbers, min_size=1, max_size=9), st.integers(0, 8), st.sampled_from([1e-6, 1e-2, 1.]))
def test_tolerance_is_relative_to_the_largest(xs, i, tol):
    want = torch.tensor(xs, dtype=torch.float64)
    size, got = want.abs().max(), want.clone()
    if size==0: size = torch.tensor(1., dtype=torch.float64)
    got[i%len(xs)] += .9*tol*size if want.abs().max()>0 else 0.
    assert difference(got, want, tol)==''
    got[i%len(xs)] += 1.2*tol*size
    assert f'[{i%len(xs)}]' in difference(got, want, tol)


@pytest.mark.parametrize('got, want', [
    (1., 1), (True, torch.tensor(True)), (torch.tensor(3), 3), (torch.ones(2, dtype=torch.bfloat16), [1., 1.]), ([], []), ({}, {}), ('a', 'a'), ({'a', 'b'}, {'b', 'a'}),
    (math.inf, math.inf), (float('nan'), float('nan')), ([math.inf, 1.], torch.tensor([math.inf, 1.])), ({'a': [1, 'x']}, {'a': [1, 'x']}), ((1, 'a'), [1, 'a']),
    (TaskVector({'w': torch.ones(2)}), {'w': torch.ones(2)}), (None, None), (torch.zeros(0), torch.zeros(0))])
def test_same(got, want): assert difference(got, want)==''


@pytest.mark.parametrize('got, want, says', [
    (torch.ones(2, 3), torch.ones(3, 2), 'shape (3, 2) expected, got (2, 3)'), (4, 3, '3 expected, got 4'), ('b', 'a', "'a' expected"), ('a', 1., '1 expected'), (1., 'a', "'a' expected"),
    (None, [1.], 'expected, got None'), ({'a': 1}, {'a': 1, 'b': 2}, '1 missing'), ({'a': 1, 'c': 1}, {'a': 1}, "too many, such as 'c'"), ([1, 'x'], [1, 'x', 2], '3 items expected'),
    (3, {'a': 1}, 'expected, got 3'), ({'a'}, {'b'}, "{'b'} expected"), (float('nan'), 1., 'got nan'), (1., math.inf, 'inf expected'), (math.inf, 1., 'got inf'), ([[1, 2], [3]], [[1, 2], [3, 4]], 'expected'),
    (torch.tensor([1, 2]), torch.tensor([1, 3]), 'at [1]: 3 expected, got 2'), (1.00001, 1, '1 expected'), (object(), 1., 'expected, got object'), ([1, 'y'], [1, 'x'], 'at [1]')])
def test_different(got, want, says): assert says in difference(got, want)


def test_zeros_expected_are_exact(): assert difference(torch.full((2,), 1e-9), torch.zeros(2)) and not difference(torch.zeros(2), -torch.zeros(2))


# stubs, copies, verdicts

def documented(x):
    "What it is to do."

def ellipsis(x): return ...
def nothing(x): return None
def passes(x): pass
def written(x): return x
def constant(x): return 3

@pytest.mark.parametrize('fn, stub', [(documented, True), (ellipsis, True), (nothing, True), (passes, True), (lambda x: ..., True), (..., True), (written, False), (constant, False), (len, False), (torch.sum, False), (Verdict, False)])
def test_stubs(fn, stub): assert is_stub(fn)==stub


def test_stub_needs_no_input(own):
    exercise('98.1', cases=lambda: 1/0, wrong=written)(written)
    assert check('98.1', documented).text=='not written yet' and check('98.1').text=='not written yet'
    with pytest.raises(ZeroDivisionError): check('98.1', constant)


def test_planned_is_not_written_yet(own):
    exercise('98.1', cases=[1], wrong=constant)(lambda x: x)
    def planned(x): raise NotImplementedError
    def later(x): return ... if x else 0
    assert check('98.1', planned).text==check('98.1', later).text=='not written yet'


def test_a_written_function_is_never_said_to_be_unwritten(own):
    exercise('98.1', cases=[1, 2], wrong=constant)(lambda x: x)
    def half(x):
        if x==1: return x
    def forgetful(x): x*1
    says = 'your function returned nothing: is a `return` missing?'
    assert check('98.1', forgetful).text==f'case 1 of 2 (x = 1): {says}' and check('98.1', half).text==f'case 2 of 2 (x = 2): {says}'
    def vague(x): raise NotImplementedError('negative x')
    assert 'raised NotImplementedError: negative x, in `def vague' in check('98.1', vague).text
    exercise('98.2', cases=[torch.tensor([1, 2])], wrong=constant)(lambda x: x.double().softmax(-1))
    def whole(x): return x.softmax(-1)                      # torch has no kernel for whole numbers
    v = check('98.2', whole)
    assert not v and "raised NotImplementedError" in v.text and "'Long'" in v.text and '\n' not in v.text


def test_nothing_is_right_where_nothing_is_asked_for(own):
    exercise('98.1', cases=[1], wrong=constant)(lambda x: None)
    assert check('98.1', lambda x: [].clear())


def test_fresh_shares_no_memory():
    t, a = torch.ones(2), np.ones(2)
    x = (t, a, [t], {'k': t}, TaskVector({'w': t}), 'text', written)
    y = fresh(x)
    for w in (y[0], y[1], y[2][0], y[3]['k'], y[4]['w']): w *= 0
    assert t.sum()==2 and a.sum()==2 and y[5:]==x[5:] and isinstance(y[4], TaskVector)


@pytest.mark.parametrize('spoil', [lambda t, a: t.zero_(), lambda t, a: a.fill(0)])
def test_writing_into_an_input_is_found_out(own, spoil):
    @exercise('98.2', cases=lambda: [(torch.ones(2), np.ones(3))], wrong=lambda t, a: 0.)
    def total(t, a): return t.sum()+a.sum()
    def mine(t, a): out = t.sum()+a.sum(); spoil(t, a); return out
    assert 'writes into' in check('98.2', mine).text and check('98.2', total)


def test_chance_is_the_same_for_both_and_leaves_the_readers_alone(own):
    exercise('98.3', cases=[3, 3], wrong=lambda n: torch.zeros(n))(lambda n: torch.randn(n))
    torch.manual_seed(5); expected = torch.randn(1); torch.manual_seed(5)
    assert check('98.3', lambda n: torch.randn(n))
    assert torch.randn(1)==expected


def test_solution_runs_once_per_case(own):
    calls = []
    exercise('98.4', cases=[1, 2], wrong=lambda x: x)(lambda x: calls.append(x) or 2*x)
    for _ in range(3): assert check('98.4', lambda x: x+x)
    assert calls==[1, 2]


def test_errors_of_the_reader_are_told_with_their_line(own):
    exercise('98.5', cases=[4], wrong=constant)(lambda x: x)
    def mine(x):
        y = 0
        return x/y
    v = check('98.5', mine)
    assert not v and v.text.endswith('raised ZeroDivisionError: division by zero, in `return x/y`') and '\n' not in repr(v)
    def exits(x): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): check('98.5', exits)
    assert 'must take (x)' in check('98.5', lambda: 1).text and 'must take (x)' in check('98.5', lambda a, b: 1).text
    assert check('98.5', lambda *a: a[0]) and check('98.5', int)


def test_judge_decides_and_its_trouble_is_told(own):
    exercise('98.6', cases=[7], judge=lambda got, want, n: '' if got>n else f'{got} is not above {n}', wrong=lambda n: n-1)(lambda n: n+1)
    assert check('98.6', lambda n: 100) and check('98.6', lambda n: 3).text=='case 1 of 1 (n = 7): 3 is not above 7'
    assert 'could not be judged' in check('98.6', lambda n: 'many').text
    self_test('98.6')


@pytest.mark.parametrize('wrong, cases, says', [(lambda x: x, [1], 'not refused'), (documented, [1], 'not refused'), (constant, [], 'no cases'), ((), [1], 'no wrong')])
def test_self_test_refuses_an_exercise_that_proves_nothing(own, wrong, cases, says):
    exercise('98.7', cases=cases, wrong=wrong)(lambda x: x)
    with pytest.raises(AssertionError, match=says): self_test('98.7')


def test_self_test_refuses_a_solution_that_fails_its_judge(own):
    exercise('98.8', cases=[1], judge=lambda got, want, x: 'no', wrong=constant)(lambda x: x)
    with pytest.raises(AssertionError, match='own solution'): self_test('98.8')


@pytest.mark.parametrize('number', ['1.1', '12', '12.x', 'x', '123.1', ''])
def test_malformed_numbers_are_refused(number):
    with pytest.raises(ValueError, match='number'): exercise(number, [1], wrong=constant)
    with pytest.raises(ValueError, match='number'): check(number, constant)


def test_unknown_numbers_are_answered_with_those_there_are():
    with pytest.raises(ValueError, match='00.1, 00.2, 00.3, not'): check('00.9', constant)
    with pytest.raises(ValueError, match='chapters 00, 01'): hint('77.1')
    with pytest.raises(TypeError, match='number'): check(12.1, constant)
    with pytest.raises(TypeError, match='fn'): check('00.1', 3)


def test_cases_are_made_once_and_described():
    made = []
    ex = Exercise('98.9', lambda w, beta: w, lambda: made.append(1) or [(torch.ones(6, 4), .1), (torch.ones(2), 3)])
    assert ex.describe(0)=='case 1 of 2 (w = float32 (6, 4), beta = 0.1)' and ex.describe(1)=='case 2 of 2 (w = [1, 1], beta = 3)' and made==[1]


@pytest.mark.parametrize('x, says', [(torch.tensor(2.), '2'), (np.zeros((2, 2)), 'float64 (2, 2)'), ([1, 2.5, 'a'], "[1, 2.5, 'a']"), ([torch.ones(2, 2)]*3, '3 × float32 (2, 2)'),
                                     (TaskVector({'w': torch.ones(2)}), 'TaskVector of 1 entries'), (written, 'written'), (None, 'None'), ([torch.ones(9), 'a'], 'list of 2'), (Exercise, 'Exercise')])
def test_kinds(x, says): assert kind_of(x)==says


def test_draw_is_the_same_everywhere():
    assert torch.equal(draw(3, 2), draw(3, 2)) and not torch.equal(draw(3), draw(3, seed=1)) and draw(2, dtype=torch.bfloat16).dtype==torch.bfloat16
    torch.testing.assert_close(draw(3), torch.tensor([1.541, -.293429, -2.17879]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('x', ['a', b'a', None, {'a': 1}, [[1, 2], [3]], ['a'], [None], object()])
def test_no_numbers_no_tensor(x): assert as_tensor(x) is None
