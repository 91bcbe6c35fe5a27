"The tuning protocol: what it finds, what it writes, and that it resumes."
import json
import pytest
from hypothesis import given, settings, strategies as st
from subspace_nb.score import Results, climb, environment, geometric_grid, tune, write_json
import pandas as pd


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(0, 29), st.floats(0, 40), st.integers(1, 3))
def test_climb_finds_a_single_peak(n, peak, start, patience):
    peak = peak%n; grid = [float(i) for i in range(n)]; calls = []
    best, seen = climb(lambda c: calls.append(c) or -abs(c-peak), grid, start, patience)
    assert best==peak and len(calls)==len(set(calls))==len(seen) and set(seen)<=set(grid)


def test_climb_prefers_the_smaller_coefficient_of_equals():
    assert climb(lambda c: float(c in (2., 3.)), [1., 2., 3., 4.])[0]==2.


def test_grid():
    g = geometric_grid(.05, 3.2)
    assert g==sorted(g) and len(g)==13 and g[0]==.05 and g[-1]==3.2
    for kwargs, name in (({'low': 0}, 'low'), ({'low': 4, 'high': 3}, 'low'), ({'ratio': 1}, 'ratio')):
        with pytest.raises(ValueError, match=name): geometric_grid(**kwargs)
    with pytest.raises(ValueError, match='grid'): climb(lambda c: c, [])


class FakePool:
    "Validation peaks at 0.5, test at 1: the protocol must choose on the first and report the second."
    def evaluate(self, state, tasks, split='test'):
        value = 1-abs(state-{'val': .5, 'test': 1.}[split])/2
        return pd.DataFrame({'accuracy': value, 'normalised': value}, index=[*tasks, 'mean'])


def test_tune_chooses_on_validation_and_reports_test():
    row = tune(FakePool(), lambda c: c, ['a'], [.25, .5, 1.])
    assert row['coefficient']==.5 and row['val']==100. and row['accuracy']==75. and row['per_task']=={'a': 75.}


def test_results_resume_and_start_anew(tmp_path):
    path = tmp_path/'deep'/'r.json'; count = []
    compute = lambda: count.append(1) or {'accuracy': 1.}
    for _ in range(2): assert Results(path, seed=0).row(compute, method='TA')['accuracy']==1.
    assert len(count)==1 and Results(path).find(method='TA')['accuracy']==1. and Results(path).find(method='TIES') is None
    Results(path, seed=1).row(compute, method='TA')
    assert len(count)==2 and json.loads(path.read_text())['meta']['settings']=={'seed': 1}
    assert set(environment())<=set(Results(path).meta)


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path/'r.json'; write_json(path, [1])
    with pytest.raises(TypeError): write_json(path, [object()])
    assert json.loads(path.read_text())==[1]
