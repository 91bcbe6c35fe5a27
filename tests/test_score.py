"The tuning protocol: what it finds, what it writes, and that it resumes."
import gc, json, multiprocessing
import pytest, torch
from hypothesis import given, settings, strategies as st
from subspace_nb.score import PeakMemory, Results, climb, environment, geometric_grid, open_results, rerun, results_folder, timed, tune, write_json
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


def fill(path, who):
    "A process's share of a sweep: five rows of its own and five that all want."
    r = Results(path, seed=0)
    for i in range(5): r.row(lambda: {'accuracy': i}, method=f'{who}-{i}'); r.row(lambda: {'accuracy': i}, method=f'all-{i}')


def test_processes_share_one_file(tmp_path):
    workers = [multiprocessing.get_context('spawn').Process(target=fill, args=(tmp_path/'r.json', w)) for w in 'ab']
    for w in workers: w.start()
    for w in workers: w.join()
    names = [r['method'] for r in Results(tmp_path/'r.json').rows]
    assert sorted(names)==sorted([f'{w}-{i}' for w in ('a', 'b', 'all') for i in range(5)])


def test_memory_gauge_sees_what_was_taken():
    _, small, _ = timed(lambda: torch.ones(2**10))
    _, large, x = timed(lambda: torch.ones(2**26))
    assert len(x)==2**26
    if PeakMemory.statm.exists(): assert small<100<200<large


class Ring:
    "Memory that only the garbage collector frees."
    def __init__(self): self.me, self.x = self, torch.ones(2**25)


def test_memory_gauge_is_not_misled_by_a_collection():
    def work():
        many = [[] for _ in range(10**6)]                                # reason enough to collect
        return len(many)+len(torch.ones(2**25))                          # 128 MiB
    gc.collect(); Ring()
    _, mib, _ = timed(work)
    if PeakMemory.statm.exists(): assert mib>125


def test_memory_gauge_leaves_the_collector_as_it_was():
    assert gc.isenabled()
    with PeakMemory('cpu'):
        assert not gc.isenabled()
        with PeakMemory('cpu'): pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(RuntimeError): timed(lambda: (_ for _ in ()).throw(RuntimeError()))
    assert gc.isenabled()


def test_sweeps_are_read_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(results_folder()/'a.json', {'meta': {'settings': {'seed': 0}}, 'rows': [{'method': 'TA'}]})
    monkeypatch.delenv('SUBSPACE_NB_RERUN', raising=False)
    assert not rerun() and len(open_results('a', seed=1).rows)==1
    monkeypatch.setenv('SUBSPACE_NB_RERUN', '1')
    assert rerun() and open_results('a', seed=1).rows==[] and len(open_results('a', seed=0).rows)==1
