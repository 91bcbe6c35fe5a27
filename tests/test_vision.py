"The sweep of all methods: what it asks for, that it resumes, that choices are made on validation."
import json, subprocess, sys
import pytest, torch
from subspace_nb import vision
from subspace_nb.experts import Pool
from subspace_nb.score import Results
from subspace_nb.tasks import TaskVector, check_same_keys
from subspace_nb.vision import Experts, Method, choose_beta, cost_row, jobs, matched, merge_row, methods, row_names, settings_of, sweep, task_order


@pytest.fixture(scope='module')
def pool(): return Pool.embedded()


@pytest.fixture(scope='module')
def two(pool): return Experts(pool, ['digits', 'chess'])


def test_orders_are_permutations_and_repeat(pool):
    for o in range(4): assert sorted(task_order(pool.tasks, o))==sorted(pool.tasks) and task_order(pool.tasks, o)==task_order(pool.tasks, o)
    assert len({tuple(task_order(pool.tasks, o)[:8]) for o in range(4)})==4


def test_the_full_set_has_one_order():
    todo = jobs([8, 20], 3, 20, ['a', 'b'])
    assert len(todo)==len(set(todo))==2*(3+1) and todo[:4]==[(8, 0, 'a'), (8, 0, 'b'), (20, 0, 'a'), (20, 0, 'b')]


@pytest.mark.parametrize('name', list(methods))
def test_every_method_merges_and_builds_a_model(two, name):
    m = methods[name]
    tau = m.merge(two)
    assert isinstance(tau, TaskVector)
    check_same_keys([two.taus[0], tau])
    state = m.build(two, tau)(.1)
    assert set(state)==set(two.pool.base) and all(v.isfinite().all() for v in state.values())
    if m.betas: assert all(isinstance(m.merge(two, beta=b), TaskVector) for b in m.betas[1:])


def test_search_starts_where_the_update_is_as_long_as_task_arithmetic(two):
    tau = two.taus[0]*7
    assert (tau*matched(tau, two.taus)).norm()==pytest.approx(.3*sum(two.taus).norm(), rel=1e-5)


class Judge:
    "Validation likes coefficient 0.16 and beta 0.02; test likes something else."
    device, base = torch.device('cpu'), {}
    def evaluate(self, state, tasks, split='test'):
        import pandas as pd
        c, beta = state
        v = 1-abs(torch.log2(torch.tensor(c/.16)).item())/10-(abs(beta-.02) if split=='val' else abs(beta))
        return pd.DataFrame({'accuracy': v, 'normalised': v}, index=[*tasks, 'mean'])


class Chosen(Method):
    def build(self, e, tau): return lambda c: (c, tau['beta'].item())


def test_beta_is_chosen_on_validation_within_the_budget():
    e = Experts(Judge(), ['a']); e.__dict__['taus'] = [TaskVector({'beta': torch.tensor(1.), 'long': torch.ones(2)})]
    m = Chosen(lambda e, beta=0.: TaskVector({'beta': torch.tensor(beta), 'long': torch.ones(2)}), betas=(0., .01, .02))
    assert choose_beta(e, m, .16)==(pytest.approx(.02), 3)
    row = merge_row(e, m)
    assert row['coefficient']==.16 and row['beta']==pytest.approx(.02) and row['evaluations']<=len(vision.grid)


def test_sweep_resumes_and_refuses_unknown_rows(pool, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(vision, 'compute', lambda e, name, c: done.append((len(e.tasks), name, c)) or dict(accuracy=1., normalised=1., coefficient=.5))
    r = Results(tmp_path/'v.json', **settings_of(pool))
    sweep(pool, r, [8], 1, ['TA', 'ESM++, rank 8'])
    assert done==[(8, 'TA', None), (8, 'ESM', None), (8, 'ESM++, rank 8', .5)]        # ESM++ extends ESM's row
    sweep(pool, Results(tmp_path/'v.json', **settings_of(pool)), [8, 20], 3, ['TA'])
    assert done[3:]==[(20, 'TA', None), (8, 'TA', None), (8, 'TA', None)]
    with pytest.raises(ValueError, match='names.*TSVM'): sweep(pool, r, names=['TSVM'])


def test_costs_are_of_the_merge_alone(two):
    row = cost_row(two, 'TA', 2)
    assert 0<row['merge_seconds']<5 and row['merge_MiB']>=0


def test_command_line_names_what_it_does_not_know(tmp_path):
    run = subprocess.run([sys.executable, '-m', 'subspace_nb.vision', '--methods', 'TSVM', '--folder', str(tmp_path)], capture_output=True, text=True)
    assert run.returncode==2 and 'TSVM' in run.stderr and 'Traceback' not in run.stderr


def test_names_are_told_apart(): assert len(row_names)==len(set(row_names)) and {'Base', 'Experts', 'ESM++, rank 8'}<=set(row_names)
