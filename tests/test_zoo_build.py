"The pool's build, run for real on a small share of the shipped images with a few steps; and its small parts."
import json, shutil
from importlib.resources import files
from pathlib import Path
import numpy as np, pytest, torch
from fastcore.script import CliError
from hypothesis import given, settings, strategies as st
from subspace_nb import zoo_build
from subspace_nb.experts import EmbeddedPool, Pool, Stem, Vision, cache_folder, check_state, pixels, stem_features
from subspace_nb.zoo_build import Work, build, draw_groups, fit, pick, rate, regime, split, timm_names

zoo = Path(str(files('subspace_nb')/'zoo'))
small = dict(seed=0, sizes=dict(test=40, val=20, proxy=8, train=60), field=dict(contrast=.5, level=118, noise=8),
             model=dict(width=64, layers=2, out=16, channels=112), base=dict(steps=2, batch=16, lr=1e-3, decay=.05, warm=1, glimpse=2, share=.5),
             expert=dict(steps=2, batch=16, lr=3e-4, decay=.1, warm=1))


@pytest.fixture
def work(tmp_path, monkeypatch):
    "Raw data of three tasks, taken from the shipped images, and the shipped stem: nothing to download."
    monkeypatch.setenv('SUBSPACE_NB_CACHE', str(tmp_path/'features'))
    pool = Pool.embedded(); (tmp_path/'raw').mkdir(); (tmp_path/'work').mkdir()
    for t in ('digits', 'clothes', 'tifinagh'):
        about = {k: pool.info[t][k] for k in ('classes', 'source', 'licence', 'kind', 'title')}
        np.savez(tmp_path/'raw'/f'{t}.npz', x=pool.images(t), y=pool.labels(t).numpy(), group=np.zeros(0, int), meta=json.dumps(about))
    shutil.copy(zoo/'stem.safetensors', tmp_path/'work'/'stem.safetensors'); (tmp_path/'work'/'stem.json').write_text('{}')
    return Work(tmp_path/'work', tmp_path, 'cpu', small, ['digits', 'clothes'], ['tifinagh'])


def test_build_resumes_and_makes_a_pool(work, tmp_path, monkeypatch):
    real, made = zoo_build.make_expert, []
    def cut(w, name):
        if name=='clothes' and not made.count('stop'): made.append('stop'); raise KeyboardInterrupt
        made.append(name); return real(w, name)
    monkeypatch.setattr(zoo_build, 'make_expert', cut)
    with pytest.raises(KeyboardInterrupt): build(work, tmp_path/'zoo')
    assert not (tmp_path/'zoo').exists() and not (work.root/'experts'/'clothes.safetensors').exists()
    base = (work.root/'base.safetensors').read_bytes()
    index = build(work, tmp_path/'zoo')
    assert made==['digits', 'stop', 'clothes'] and (work.root/'base.safetensors').read_bytes()==base
    assert not list(tmp_path.rglob('*.tmp'))
    pool = EmbeddedPool(tmp_path/'zoo')
    assert pool.tasks==['digits', 'clothes'] and index['tasks'][0]['sizes']['test']==40 and len(pool.images('digits'))==40
    assert pool.task_vector('digits').norm()>0 and set(pool.evaluate(pool.base).index)=={'digits', 'clothes', 'mean'}
    for t in pool.tasks: assert pool.info[t]['line'][0]==pool.info[t]['base']['test'] and t in (tmp_path/'zoo'/'LICENSES.md').read_text()


def test_a_work_folder_keeps_its_recipe(work):
    with pytest.raises(ValueError, match='recipe'): Work(work.root, work.cache, 'cpu', small | {'seed': 1}, work.tasks, work.pretrain)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10**6))
def test_splits_do_not_overlap_and_test_groups_are_apart(groups, seed):
    rng = np.random.RandomState(seed); g = np.sort(rng.randint(groups, size=300)); y = rng.randint(5, size=300)
    s = split(y, g, dict(test=40, val=20, proxy=8, train=100), seed)
    together = np.concatenate(list(s.values())); assert len(together)==len(set(together))
    if len(np.unique(g))>1:
        for k in ('val', 'proxy', 'train'): assert not set(g[s['test']]) & set(g[s[k]])
    again = split(y, g, dict(test=40, val=20, proxy=8, train=100), seed)
    assert all((s[k]==again[k]).all() for k in s)


def test_pick_is_even_over_classes():
    y = np.array([0]*50+[1]*5+[2]*50); i = pick(np.arange(105), y, 15, np.random.RandomState(0))
    assert np.bincount(y[i]).tolist()==[5, 5, 5]
    names = [0, 1, 2]; assert draw_groups(names, {h: np.array([10, 10]) for h in names}, 25)==[0, 1] and names==[2]


def test_learning_rate_and_fit():
    r = [rate(s, 10, 3) for s in range(11)]
    assert r[0]==pytest.approx(1/3) and max(r)==1 and r[-1]==pytest.approx(0, abs=1e-9)
    w = torch.ones(2, requires_grad=True); losses = fit([w], lambda _: w.square().sum(), 50, .1, 0., 2, rate=rate)
    assert losses[-1]<losses[0]


def test_regime_of_planted_task_vectors():
    torch.manual_seed(0); key = 'visual.transformer.resblocks.0.mlp.c_fc.weight'; shared = torch.randn(32, 16)
    alike = regime([{key: shared+.01*torch.randn(32, 16)} for _ in range(20)]); apart = regime([{key: torch.randn(32, 16)} for _ in range(20)])
    assert alike['cosine']>.99 and alike['exponent']==pytest.approx(1, abs=.02)
    assert abs(apart['cosine'])<.05 and apart['exponent']==pytest.approx(.5, abs=.1)


def test_model_parts():
    x = pixels(np.zeros((2, 32, 32, 3), np.uint8)); assert x.shape==(2, 3, 64, 64)
    f = stem_features(Stem().eval(), np.zeros((3, 32, 32), np.uint8)); assert f.shape==(3, 112, 4, 4) and f.dtype==torch.float16
    model = Vision(64, 2, 16); assert model(f.float()).shape==(3, 16)
    state = model.state_dict(); assert check_state(state, state) is state and cache_folder().name
    with pytest.raises(ValueError, match='visual.proj'): check_state({k: v for k, v in state.items() if k!='visual.proj'}, state)

def test_commands_that_cannot_go_on(tmp_path, monkeypatch, capsys):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(zoo_build, 'main_language', stop)
    with pytest.raises(SystemExit) as e: zoo_build.main('language', work=str(tmp_path), device='cpu')
    assert e.value.code==130 and 'goes on where this one stopped' in capsys.readouterr().err
    for device in ('nothing', *(() if torch.cuda.is_available() else ('cuda',))):
        with pytest.raises(CliError, match='device'): zoo_build.main('language', work=str(tmp_path), device=device)
    with pytest.raises(CliError, match='what must be'): zoo_build.main('speech')
